"""compressed-tensors files, as llm-compressor writes them: whole numbers of 2, 4 or 8 bits in groups or by row; formats ``pack-quantized``
and ``int-quantized``. Floats of 8 or 4 bits (FP8, NVFP4) are refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from optkit.core.errors import ModelError
from optkit.kernels.w8a8 import W8A8Linear
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


class Inputs(BaseModel):
    """How the inputs of a group of layers are rounded while the model runs."""

    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str = False


class Scheme(BaseModel):
    """A group of layers that are stored alike."""

    targets: list[str] = []
    weights: Weights | None = None
    input_activations: Inputs | None = None
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
        rounded = self._rounded_inputs(parts, place.name)
        if rounded is not None and bits == 8 and groups == 1 and bool((point == 128).all()):
            return _w8a8(numbers, scale, rounded, parts.pop("bias", None), place)
        found = layer_of(Grid(bits, numbers, point, scale.contiguous(), index), parts.pop("bias", None), place)
        for key in ("input_scale", "input_zero_point", "input_global_scale"):
            parts.pop(key, None)
        if not self._has_float_inputs(place.name):
            return found._replace(
                note="; ".join(filter(None, (found.note, "its activations stay floats here, where the tool rounds them")))
            )
        return found

    def _rounded_inputs(self, parts: dict[str, Tensor], name: str) -> tuple[Tensor, ...] | None:
        """Return the static scale of the inputs, or nothing in a tuple where each row has its own; None where inputs stay floats."""
        schemes = list(self.config_groups.values())
        named = [scheme for scheme in schemes if name in scheme.targets]
        told = [scheme.input_activations for scheme in (named or schemes)]
        if len(told) != 1 or told[0] is None or told[0].num_bits != 8 or told[0].type != "int" or not told[0].symmetric:
            return None
        if told[0].dynamic is True and told[0].strategy == "token":
            return ()
        scale = parts.get("input_scale")
        if told[0].dynamic is False and scale is not None and scale.numel() == 1 and "input_zero_point" not in parts:
            return (parts.pop("input_scale").float().reshape(1),)
        return None

    def _has_float_inputs(self, name: str) -> bool:
        schemes = list(self.config_groups.values())
        named = [scheme for scheme in schemes if name in scheme.targets]
        return not any(scheme.input_activations for scheme in named or schemes)

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


def _w8a8(numbers: Tensor, scale: Tensor, static: tuple[Tensor, ...], bias: Tensor | None, place: Place) -> Found:
    refuse_shape(numbers, (place.out_features, place.in_features), f"{place.name}.weight")
    if not bool(torch.isfinite(scale).all()) or any(not bool(torch.isfinite(one).all()) for one in static):
        raise ModelError(f"{place.name}: scales are NaN or infinite")
    if bias is not None:
        refuse_shape(bias, (place.out_features,), f"{place.name}.bias")
        bias = bias.to(place.dtype)
    q = (numbers.to(torch.int16) - 128).to(torch.int8)
    layer = W8A8Linear((q, scale.float()[:, 0].contiguous(), *static), bias, place.dtype)
    return Found(layer, "" if static else "inputs are scaled by their largest value / 127 here, where the tool divides by 127.5")
