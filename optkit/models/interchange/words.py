"""Whole numbers of few bits packed in int32 words, the lowest bits first, as GPTQ, AWQ and compressed-tensors store them."""

from __future__ import annotations

import torch
from torch import Tensor

from optkit.core.errors import ModelError

BITS = (2, 4, 8)  # that divide a word; 3 bits straddle words, and each tool has its own way


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return int32 words (rows, n) as numbers 0..2^bits - 1 in uint8 (rows, n * 32 / bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    numbers: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(-2)


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """Return numbers 0..2^bits - 1 (rows, columns) as int32 words (rows, columns * bits / 32, rounded up); the rest is zeros."""
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % (32 // bits))).to(torch.int64)
    shifts = torch.arange(0, 32, bits, device=numbers.device)
    return (padded.reshape(len(padded), -1, 32 // bits) << shifts).sum(dim=-1).to(torch.int32)


def bits_of(words: int, columns: int, name: str) -> int:
    """Return how many bits each of ``columns`` numbers has in so many words.

    Raises:
        ModelError: none of the widths that are read here fits.
    """
    for bits in BITS:
        if words == -(-columns * bits // 32):
            return bits
    raise ModelError(f"{name}: {words} words of 32 bits for {columns} numbers fit none of {', '.join(map(str, BITS))} bits")
