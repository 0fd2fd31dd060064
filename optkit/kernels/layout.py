"""Between the portable layout of packed weights, which is saved, and the layout of the kernels, which runs. Both directions are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LANES = 16
_QUADS = 64  # columns that are padded to a whole


def pack_nibbles(q: Tensor) -> Tensor:
    """Return numbers 0..15 (out, in) as bytes (out, in / 2): the even column in the low half, the odd one in the high half."""
    return q[:, 0::2] | q[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return bytes (out, in / 2) as numbers 0..15 in uint8 (out, in)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def rows_to_kernel(q: Tensor) -> Tensor:
    """Return int8 (out, in) as (blocks, in rounded up to 4, 16): 16 output rows side by side, rows and columns beyond the last zero."""
    rows, cols = q.shape
    padded = functional.pad(q, (0, -cols % 4, 0, -rows % LANES))
    return padded.reshape(-1, LANES, padded.shape[1]).transpose(1, 2).contiguous()


def rows_from_kernel(kernel: Tensor, rows: int, cols: int) -> Tensor:
    """Return int8 (out, in) from the layout of ``rows_to_kernel``."""
    return kernel.transpose(1, 2).flatten(0, 1)[:rows, :cols].contiguous()


def quads_to_kernel(q: Tensor) -> Tensor:
    """Return int8 (out, in) as (blocks, in rounded up to 64, divided by 4, 16, 4): four columns of 16 output rows side by side.

    Rows and columns beyond the last are zero.
    """
    rows, cols = q.shape
    padded = functional.pad(q, (0, -cols % _QUADS, 0, -rows % LANES))
    return padded.reshape(-1, LANES, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()


def quads_from_kernel(kernel: Tensor, rows: int, cols: int) -> Tensor:
    """Return int8 (out, in) from the layout of ``quads_to_kernel``."""
    return kernel.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :cols].contiguous()


def with_totals(quads: Tensor) -> Tensor:
    """Return the layout of ``quads_to_kernel`` with four more bytes a row: 128 times the row's sum, an int32 that may wrap around.

    It is what a product with unsigned inputs, each 128 too large, is too large by.
    """
    totals = quads.sum(dim=(1, 3), dtype=torch.int64).mul_(128).to(torch.int32)
    return torch.cat((quads, totals.view(torch.int8).view(-1, 1, LANES, 4)), dim=1)


def groups_to_kernel(packed: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    """Return int4 weights as bytes (blocks, groups, 8 * group_size + 64): the numbers of 16 output rows, then their scales and points.

    Args:
        packed: bytes (out, in / 2), two numbers each.
        scale: (out, groups) of a type of 16 bits.
        point: the same.
    """
    groups = scale.shape[1]
    blocks = functional.pad(packed, (0, 0, 0, -packed.shape[0] % LANES)).reshape(-1, LANES, packed.shape[1] // 4, 4)
    low, high = blocks & 15, blocks >> 4  # columns 0 2 4 6 and 1 3 5 7 of each eight
    halves = torch.cat((low, high), dim=-1)
    dwords = (halves[..., 0::2] | halves[..., 1::2] << 4).transpose(1, 2)  # (blocks, in / 8, 16, 4)
    numbers = dwords.reshape(dwords.shape[0], groups, -1)
    return torch.cat((numbers, _lanes_to_bytes(scale), _lanes_to_bytes(point)), dim=-1)


def groups_from_kernel(kernel: Tensor, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return bytes (out, in / 2), scale and point (out, groups) of the given dtype from the layout of ``groups_to_kernel``."""
    end = kernel.shape[2] - 4 * LANES
    dwords = kernel[:, :, :end].reshape(kernel.shape[0], cols // 8, LANES, 4).transpose(1, 2)
    halves = torch.stack((dwords & 15, dwords >> 4), dim=-1).flatten(-2)
    packed = (halves[..., :4] | halves[..., 4:] << 4).flatten(2).flatten(0, 1)[:rows].contiguous()
    scale = _bytes_to_lanes(kernel[:, :, end : end + 2 * LANES], rows, dtype)
    return packed, scale, _bytes_to_lanes(kernel[:, :, end + 2 * LANES :], rows, dtype)


def _lanes_to_bytes(values: Tensor) -> Tensor:
    padded = functional.pad(values, (0, 0, 0, -values.shape[0] % LANES))
    return padded.reshape(-1, LANES, padded.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def _bytes_to_lanes(raw: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return raw.contiguous().view(dtype).transpose(1, 2).flatten(0, 1)[:rows].contiguous()
