"""Keys and values in 8 or 4 bits, one position at a time, so that a cache can be filled as a text grows. No data is needed.

Asymmetric, with one scale and one lowest value for each position, head and group of channels. KIVI (arXiv 2402.02750) and KVQuant
(arXiv 2401.18079) find values best quantized per position, and keys per channel where a few channels are large; keys per channel
need many positions at once, which a stream of single tokens does not give, so here smaller groups of channels take that part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.layout import pack_nibbles, unpack_nibbles

_WIDEN = 1 + 2**-8  # more than rounding to bfloat16 can take away
_SMALLEST = 1e-30


class Packed(NamedTuple):
    """Keys, or values, of one layer. b sequences, h key-value heads, n positions, d channels of a head, g groups of channels.

    ``numbers``: uint8, (b, h, n, d) for 8 bits; for 4 bits (b, h, n, d / 2), the even channel in the low half of a byte.
    ``scale`` and ``low``: bfloat16, (b, h, n, g); group i holds the channels from i * d / g on.
    """

    numbers: Tensor
    scale: Tensor
    low: Tensor

    @property
    def positions(self) -> int:
        """How many positions are held."""
        return self.numbers.shape[-2]

    def followed_by(self, later: Packed) -> Packed:
        """Return both, one behind the other."""
        return Packed(*(torch.cat(pair, dim=-2) for pair in zip(self, later, strict=True)))

    def without_first(self, count: int) -> Packed:
        """Return the positions from ``count`` on, in memory of their own."""
        return Packed(*(part[..., count:, :].clone() for part in self))


def quantize(x: Tensor, bits: int, group_size: int | None = None) -> Packed:
    """Return floats (b, h, n, d) as x ~ number * scale + low, where number is one of 0 .. 2**bits - 1.

    With ``low`` just below the smallest x of the group and ``scale`` just above (largest x - low) / (2**bits - 1), both rounded to
    bfloat16 before a number is chosen, nothing is clipped: no x moves by more than scale / 2. A position never looks at another.
    NaN and infinity make their whole group NaN.

    Args:
        x: any floating type.
        bits: 8 or 4.
        group_size: channels that share a scale; None for all of a head.

    Raises:
        TransformError: the groups do not divide the head, or two numbers do not fit a byte.
    """
    channels = x.shape[-1]
    size = channels if group_size is None else group_size
    reason = refusal(channels, bits, group_size)
    if reason is not None:
        raise TransformError(reason)
    groups = x.float().unflatten(-1, (-1, size))
    lowest, highest = groups.amin(-1), groups.amax(-1)
    low = (lowest - lowest.abs() * (_WIDEN - 1)).bfloat16()
    levels = 2**bits - 1
    scale = ((highest - low.float()) / levels * _WIDEN).clamp_min(_SMALLEST).bfloat16()
    steps = (groups - low.float()[..., None]) / scale.float()[..., None]
    numbers = steps.round_().clamp_(0, levels).nan_to_num_(0).to(torch.uint8).flatten(-2)
    if bits == 4:
        numbers = pack_nibbles(numbers.flatten(0, -2)).unflatten(0, numbers.shape[:-1])
    return Packed(numbers, scale, low)


def bytes_of(channels: int, bits: int, group_size: int | None = None) -> float:
    """Return the bytes of the keys, or of the values, of one position and head with so many channels, packed."""
    return channels * bits / 8 + 4 * channels / (channels if group_size is None else group_size)


def dequantize(packed: Packed, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (b, h, n, d) floats of the given type: number * scale + low, computed in float32."""
    numbers = packed.numbers
    if bits == 4:
        numbers = unpack_nibbles(numbers.flatten(0, -2)).unflatten(0, numbers.shape[:-1])
    groups = numbers.unflatten(-1, (packed.scale.shape[-1], -1)).float()
    return torch.addcmul(packed.low.float()[..., None], groups, packed.scale.float()[..., None]).flatten(-2).to(dtype)


def refusal(channels: int, bits: int, group_size: int | None) -> str | None:
    """Return why heads of so many channels cannot be quantized so, or None where they can."""
    if bits == 4 and channels % 2:
        return f"a head of {channels} channels does not fill whole bytes with 4 bits; use bits: 8"
    if group_size is not None and channels % group_size:
        divisors = ", ".join(str(size) for size in (16, 32, 64, 128) if channels % size == 0) or str(channels)
        return f"group_size {group_size} does not divide the {channels} channels of a head; use {divisors}, or leave it out"
    return None
