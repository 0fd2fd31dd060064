"""Products with int4 weights on CUDA: PyTorch's tinygemm, for bfloat16 inputs, on weights in tiles.

Source: ``aten::_weight_int4pack_mm`` and ``_convert_weight_to_int4pack``, as torchao's ``tile_packed_to_4d`` calls them. It computes
(q - 8) * scale + zero with both in bfloat16, so ``zero`` = (8 - point) * scale is rounded: by at most 1/32 of a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INNER_TILES = 8
_COLUMNS, _ROWS = 16 * _INNER_TILES, 8
_GROUPS = (32, 64, 128, 256)
_MIDDLE = 8


class Tiles(NamedTuple):
    """Weights as tinygemm reads them, and (groups, out, 2) scales and zeros."""

    weight: Tensor
    scale_and_zero: Tensor


def fits(rows: int, cols: int, group: int) -> bool:
    """Say whether tinygemm takes weights of this size with groups of this many columns."""
    return cols % _COLUMNS == 0 and rows % _ROWS == 0 and group in _GROUPS


def tiles_of(q: Tensor, scale: Tensor, point: Tensor) -> Tiles:
    """Return q (out, in / 2), two numbers a byte with the even column low, and scale and point (out, groups) in tiles."""
    even_high = (q << 4) | (q >> 4)
    return Tiles(torch._convert_weight_to_int4pack(even_high, _INNER_TILES), scale_and_zero(scale, point))


def scale_and_zero(scale: Tensor, point: Tensor) -> Tensor:
    """Return (groups, out, 2) bfloat16: the scale, and what (q - 8) * scale lacks of (q - point) * scale."""
    wide = scale.float()
    return torch.stack((wide, (_MIDDLE - point.float()) * wide), dim=-1).transpose(0, 1).contiguous().bfloat16()


def product(input: Tensor, tiles: Tiles, group: int, bias: Tensor | None) -> Tensor:
    """Return bfloat16 input (..., in) times the weight (out, in), transposed, plus bias (out,)."""
    rows = input.reshape(-1, input.shape[-1])
    output = torch._weight_int4pack_mm(rows, tiles.weight, group, tiles.scale_and_zero)
    output = output if bias is None else output + bias.to(output.dtype)
    return output.reshape(*input.shape[:-1], output.shape[-1])
