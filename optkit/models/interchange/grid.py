"""Puts numbers, points and scales of any tool into a layer that runs here, without changing a number; or says why it cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from optkit.core.errors import ModelError
from optkit.kernels.int4 import GROUP_SIZES, Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.layout import pack_nibbles


class Place(NamedTuple):
    """Where a layer goes: its dotted name, its sizes, and the dtype the model computes in."""

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype


class Found(NamedTuple):
    """A layer that was read; ``note`` says why it is not packed, or what else differs."""

    layer: nn.Linear
    note: str = ""


class Grid(NamedTuple):
    """A quantized weight by its law: w[r, c] = (numbers[r, c] - point[r, g]) * scale[r, g] with g = group_of[c]."""

    bits: int
    numbers: Tensor  # uint8 (out, in)
    point: Tensor  # whole numbers (out, groups)
    scale: Tensor  # floats (out, groups)
    group_of: Tensor  # (in,): the group of each column

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in): in float32, rounded to the dtype of the scale as the tools do, then to ``dtype``."""
        if self.numbers.is_meta:
            return self.numbers.to(dtype)
        columns = self.group_of.long()
        weight = (self.numbers.float() - self.point.float()[:, columns]) * self.scale.float()[:, columns]
        return weight.to(self.scale.dtype).to(dtype)


def layer_of(grid: Grid, bias: Tensor | None, place: Place) -> Found:
    """Return the packed layer where one can hold the grid exactly, else a plain one and the reason.

    Raises:
        ModelError: shapes contradict one another, or scales are not finite.
    """
    _refuse_shapes(grid, bias, place)
    if bias is not None:
        bias = bias.to(place.dtype)
    groups = grid.scale.shape[1]
    group = place.in_features // groups
    reason = ""
    if not torch.equal(grid.group_of.long(), torch.arange(place.in_features) // group) or place.in_features % groups:
        reason = "the columns of a group are not side by side (act-order), or groups are of unequal size"
    elif grid.bits == 8:
        if groups == 1 and bool((grid.point == 128).all()):
            numbers = (grid.numbers.to(torch.int16) - 128).to(torch.int8)
            sizes = (place.in_features, place.out_features)
            return Found(Int8Linear((numbers, grid.scale.float()[:, 0].contiguous()), bias, sizes, place.dtype))
        reason = "8 bits in groups of columns, or with zero points"
    else:
        pieces = [size for size in GROUP_SIZES if group % size == 0]
        kind = _exact_half(grid.scale)
        if pieces and kind is not None:
            repeats = group // pieces[-1]
            scale, point = (values.to(kind).repeat_interleave(repeats, dim=1) for values in (grid.scale, grid.point))
            return Found(Int4Linear((pack_nibbles(grid.numbers), scale, point), bias, pieces[-1], place.dtype))
        reason = f"groups of {group}" if not pieces else f"scales in {grid.scale.dtype} that 16 bits do not hold"
    return Found(plain_layer(grid.dequantize(place.dtype), bias), reason)


def plain_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of this weight (out, in)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def refuse_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ModelError: names the tensor and both shapes.
    """
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{name} is {tuple(tensor.shape)}, expected {shape}")


def take(parts: dict[str, Tensor], key: str, place: Place, kinds: tuple[torch.dtype, ...]) -> Tensor:
    """Take a tensor of a layer out of its parts.

    Raises:
        ModelError: it is not there, or of another dtype.
    """
    if key not in parts:
        raise ModelError(f"{place.name}.{key} is missing")
    tensor = parts.pop(key)
    if tensor.dtype not in kinds:
        expected = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise ModelError(f"{place.name}.{key} is {str(tensor.dtype).removeprefix('torch.')}, expected {expected}")
    return tensor


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _refuse_shapes(grid: Grid, bias: Tensor | None, place: Place) -> None:
    refuse_shape(grid.numbers, (place.out_features, place.in_features), f"{place.name}: the weight, unpacked,")
    refuse_shape(grid.point, tuple(grid.scale.shape), f"{place.name}: the zero points, unpacked,")
    if grid.scale.dim() != 2 or grid.scale.shape[0] != place.out_features or not 0 < grid.scale.shape[1] <= place.in_features:
        raise ModelError(f"{place.name}: scales of shape {tuple(grid.scale.shape)} do not fit a weight {tuple(grid.numbers.shape)}")
    refuse_shape(grid.group_of, (place.in_features,), f"{place.name}: the group of each column")
    if int(grid.group_of.min()) < 0 or int(grid.group_of.max()) >= grid.scale.shape[1]:
        raise ModelError(f"{place.name}: columns belong to groups 0 to {grid.scale.shape[1] - 1}, but {int(grid.group_of.max())} is named")
    if bias is not None:
        refuse_shape(bias, (place.out_features,), f"{place.name}.bias")
    if not bool(torch.isfinite(grid.scale).all()):
        raise ModelError(f"{place.name}: scales are NaN or infinite")


def _exact_half(scale: Tensor) -> torch.dtype | None:
    """Return a dtype of 16 bits that holds all scales exactly."""
    kinds = (scale.dtype,) if scale.dtype in (torch.float16, torch.bfloat16) else (torch.bfloat16, torch.float16)
    return next((kind for kind in kinds if torch.equal(scale.to(kind).float(), scale.float())), None)
