"""compressed-tensors files, as llm-compressor writes them: whole numbers of 2, 4 or 8 bits in groups or by row; formats ``pack-quantized``
and ``int-quantized``. Floats of 8 or 4 bits (FP8, NVFP4) are refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from optkit.core.errors import ModelError
from optkit.models.interchange.grid import FLOATS, Found, Grid, Place, layer_of, refuse_shape, take
from optkit.models.interchange.words import bits_of, unpack_words

KEY = "weight_scale"
FORMATS = ("pack-quantized", "int-quantized")


class Weights(BaseModel):
    """How the weights of a group of layers are stored."""

    num_bits: int
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = Field(default=None, ge=-1)
    actorder: Any = None


class Scheme(BaseModel):
    """A group of layers that are stored alike."""

    weights: Weights | None = None
    input_activations: Any = None
    format: str | None = None


class Settings(BaseModel):
    """What ``quantization_config`` must say; which layer is stored how is read off the tensors."""

    config_groups: dict[str, Scheme]
    format: str
    quantization_status: Literal["compressed", "frozen"] = "compressed"
    kv_cache_scheme: Any = None
    sparsity_config: Any = None
    transform_config: Any = None

    def refuse(self) -> None:
        """Refuse what is not read here.

        Raises:
            ModelError: names it.
        """
        for name, scheme in self.config_groups.items():
            kind, written = scheme.weights, scheme.format or self.format
            if written not in FORMATS:
                raise ModelError(f"compressed-tensors format {written!r} is not read here; known: {', '.join(FORMATS)}")
            if kind is not None and kind.type != "int":
                raise ModelError(f"compressed-tensors {name} has weights of type {kind.type!r}; only whole numbers are read here")
            if kind is not None and kind.strategy not in (None, "group", "channel", "tensor"):
                raise ModelError(f"compressed-tensors {name} has strategy {kind.strategy!r}; known: group, channel, tensor")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            told = getattr(self, key)
            if told and not (isinstance(told, dict) and told.get("format") == "dense"):
                raise ModelError(f"compressed-tensors {key} is not read here, and leaving it out would change the model")

    def read(self, parts: dict[str, Tensor], place: Place) -> Found:
        """Return the layer for ``weight_packed`` or int8 ``weight``, with ``weight_scale`` and perhaps ``weight_zero_point``.

        Raises:
            ModelError: a tensor is missing, or of another shape or dtype.
        """
        scale = take(parts, "weight_scale", place, FLOATS)
        scale = scale.reshape(-1, 1).expand(place.out_features, 1) if scale.numel() == 1 else scale
        refuse_shape(scale, (place.out_features, scale.shape[-1]), f"{place.name}.weight_scale")
        bits, numbers = self._packed(parts, place) if "weight_packed" in parts else self._plain(parts, place)
        point = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int16)
        if "weight_zero_point" in parts:
            point = self._points(parts.pop("weight_zero_point"), bits, scale, place)
        groups = scale.shape[1]
        index = parts.pop("weight_g_idx", None)
        if index is None:
            if place.in_features % groups:
                raise ModelError(f"{place.name}: {groups} groups do not divide {place.in_features} inputs")
            index = torch.arange(place.in_features) // (place.in_features // groups)
        found = layer_of(Grid(bits, numbers, point, scale.contiguous(), index), parts.pop("bias", None), place)
        static = [parts.pop(key, None) for key in ("input_scale", "input_zero_point", "input_global_scale")]
        if any(scheme.input_activations for scheme in self.config_groups.values()) or static[0] is not None:
            return found._replace(
                note="; ".join(filter(None, (found.note, "its activations stay floats here, where the tool rounds them")))
            )
        return found

    def _packed(self, parts: dict[str, Tensor], place: Place) -> tuple[int, Tensor]:
        words = take(parts, "weight_packed", place, (torch.int32,))
        shape = take(parts, "weight_shape", place, (torch.int64, torch.int32))
        if shape.numel() != 2 or shape.tolist() != [place.out_features, place.in_features]:
            raise ModelError(f"{place.name}.weight_shape is {shape.tolist()[:4]}, expected {[place.out_features, place.in_features]}")
        if words.dim() != 2:
            raise ModelError(f"{place.name}.weight_packed must be a matrix")
        bits = bits_of(words.shape[1], place.in_features, f"{place.name}.weight_packed")
        refuse_shape(words, (place.out_features, words.shape[1]), f"{place.name}.weight_packed")
        return bits, unpack_words(words, bits)[:, : place.in_features]

    def _plain(self, parts: dict[str, Tensor], place: Place) -> tuple[int, Tensor]:
        weight = take(parts, "weight", place, (torch.int8,))
        refuse_shape(weight, (place.out_features, place.in_features), f"{place.name}.weight")
        return 8, (weight.to(torch.int16) + 128).to(torch.uint8)

    def _points(self, stored: Tensor, bits: int, scale: Tensor, place: Place) -> Tensor:
        if stored.dtype == torch.int8:
            signed = stored.reshape(-1, 1).expand(scale.shape) if stored.numel() == 1 else stored
            return signed.to(torch.int16).add(2 ** (bits - 1))
        if stored.dtype != torch.int32:
            raise ModelError(f"{place.name}.weight_zero_point is {stored.dtype}, expected int8 or packed int32")
        refuse_shape(stored, (-(-place.out_features * bits // 32), scale.shape[1]), f"{place.name}.weight_zero_point")
        point = unpack_words(stored.T.contiguous(), bits)[:, : place.out_features].T
        return point.to(torch.int16)
