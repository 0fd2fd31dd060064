"""bitsandbytes files as transformers saves them: 4-bit blocks (NF4, FP4) and LLM.int8(). The same tensors run here and are saved again."""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optkit.core.errors import ModelError, TransformError
from optkit.kernels.bnb import Bits4Linear, BitsandbytesLinear, refuse_sizes
from optkit.kernels.llm_int8 import LlmInt8Linear
from optkit.models.interchange.grid import FLOATS, Found, Place, plain_layer, refuse_shape, take

KEY = "weight"
_TEXTS = {"nf4": "weight.quant_state.bitsandbytes__nf4", "fp4": "weight.quant_state.bitsandbytes__fp4"}


class _State(BaseModel, strict=True):
    """The text beside each 4-bit weight."""

    quant_type: str
    blocksize: int = Field(gt=0)
    dtype: str = Field(pattern="^(float16|bfloat16|float32)$")
    shape: list[int]
    nested_blocksize: int | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = Field(default=None, allow_inf_nan=False)


class Settings(BaseModel):
    """What ``quantization_config`` must say; which layer is stored how is read off the tensors."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    llm_int8_threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: str = Field(default="float32", pattern="^(float16|bfloat16|float32)$")

    def refuse(self) -> None:
        """Refuse what is not read here.

        Raises:
            ModelError: names it.
        """
        if self.load_in_4bit == self.load_in_8bit or self.llm_int8_has_fp16_weight:
            raise ModelError("quantization_config of bitsandbytes must set one of load_in_4bit and load_in_8bit, and store int8 weights")

    def read(self, parts: dict[str, Tensor], place: Place) -> Found | None:
        """Return the layer for the tensors that bitsandbytes saves; None where the layer was left in float.

        Raises:
            ModelError: a tensor is missing, or of another shape or dtype.
        """
        if "weight" in parts and parts["weight"].is_floating_point():
            return None
        bias = parts.pop("bias", None)
        if bias is not None:
            refuse_shape(bias, (place.out_features,), f"{place.name}.bias")
            bias = bias.to(place.dtype)
        return self._read4(parts, bias, place) if self.load_in_4bit else self._read8(parts, bias, place)

    def _read4(self, parts: dict[str, Tensor], bias: Tensor | None, place: Place) -> Found:
        format = next((format for format, key in _TEXTS.items() if key in parts), None)
        if format is None:
            raise ModelError(f"{place.name} has no quant_state of nf4 or fp4 beside its weight")
        tensors = {"text": take(parts, _TEXTS[format], place, (torch.uint8,)), "numbers": take(parts, "weight", place, (torch.uint8,))}
        state = _state(tensors["text"], format, place)
        nested = state.nested_blocksize is not None
        tensors["absmax"] = take(parts, "weight.absmax", place, (torch.uint8 if nested else torch.float32,))
        for name in ("quant_map", "nested_absmax", "nested_quant_map")[: 3 if nested else 1]:
            tensors[name] = take(parts, f"weight.{name}", place, (torch.float32,))
        kind = getattr(torch, self.bnb_4bit_compute_dtype)
        sizes = (place.in_features, place.out_features)
        with torch.device("meta"):
            empty = Bits4Linear.empty(*sizes, False, "float32", format, nested, state.blocksize, len(tensors["text"]))
        for name, expected in empty.named_buffers():
            refuse_shape(tensors[name], tuple(expected.shape), f"{place.name}: {empty.saved[name]}")
        layer = Bits4Linear(tensors, bias, sizes, kind, format, state.blocksize)
        try:
            refuse_sizes(*sizes, state.blocksize)
        except TransformError as error:
            return Found(plain_layer(_dense(layer, place), bias), str(error))
        return Found(layer)

    def _read8(self, parts: dict[str, Tensor], bias: Tensor | None, place: Place) -> Found:
        numbers, scale = take(parts, "weight", place, (torch.int8,)), take(parts, "SCB", place, FLOATS).float()
        refuse_shape(numbers, (place.out_features, place.in_features), f"{place.name}.weight")
        refuse_shape(scale, (place.out_features,), f"{place.name}.SCB")
        order = parts.pop("weight_format", torch.tensor(0, dtype=torch.uint8))
        if order.numel() != 1 or int(order) != 0:
            raise ModelError(f"{place.name}.weight_format is not 0 (rows); save it anew with bitsandbytes 0.45 or later")
        tensors = {"numbers": numbers, "scale": scale, "order": torch.tensor(0, dtype=torch.uint8)}
        sizes = (place.in_features, place.out_features)
        return Found(LlmInt8Linear(tensors, bias, sizes, place.dtype, self.llm_int8_threshold))


def quantization_config(module: nn.Module) -> dict[str, Any] | None:
    """Return what plain transformers needs to know to open a model whose layers are those of bitsandbytes; None where it could not."""
    found = [layer for layer in module.modules() if isinstance(layer, BitsandbytesLinear)]
    if not found or len({type(layer) for layer in found}) > 1 or len({layer.compute_dtype for layer in found}) > 1:
        return None
    plain = [name for name, layer in module.named_modules() if isinstance(layer, Conv1D) or type(layer) is nn.Linear]
    shared = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": plain}
    first = found[0]
    if isinstance(first, LlmInt8Linear):
        if len({layer.threshold for layer in found if isinstance(layer, LlmInt8Linear)}) > 1:
            return None
        return {**shared, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": first.threshold}
    assert isinstance(first, Bits4Linear)
    kind = str(first.compute_dtype).removeprefix("torch.")
    blocks = {"bnb_4bit_quant_type": first.format, "bnb_4bit_use_double_quant": first.double_quant, "bnb_4bit_compute_dtype": kind}
    return {**shared, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_storage": "uint8", **blocks}


def _dense(layer: Bits4Linear, place: Place) -> Tensor:
    if layer.numbers.is_meta:
        return torch.empty(place.out_features, place.in_features, dtype=place.dtype, device="meta")
    return layer.dequantize().to(place.dtype)


def _state(text: Tensor, format: str, place: Place) -> _State:
    try:
        state = _State.model_validate(json.loads(bytes(text.tolist()).decode()))
    except (ValueError, ValidationError, RecursionError) as error:
        raise ModelError(f"{place.name}: its quant_state cannot be read: {str(error).splitlines()[0]}") from None
    nested = {state.nested_blocksize, state.nested_dtype}
    if state.quant_type != format or state.shape != [place.out_features, place.in_features] or nested not in ({None}, {256, "float32"}):
        raise ModelError(f"{place.name}: its quant_state does not fit a {format} weight {(place.out_features, place.in_features)}")
    if (state.nested_offset is None) != (state.nested_blocksize is None) or place.in_features * place.out_features % state.blocksize:
        raise ModelError(f"{place.name}: its quant_state lacks an offset, or blocks of {state.blocksize} do not divide its weights")
    return state
