"""What a model and its configuration say of its blocks by number, and how they say it of fewer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
"""By which names a configuration counts blocks."""
_NOT_BY_BLOCK = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}  # lists that count something else


def renumber(blocks: Iterable[nn.Module]) -> None:
    """Number blocks anew, in their order: a cache of keys and values has its places by these numbers."""
    for position, block in enumerate(blocks):
        for layer in block.modules():
            if isinstance(getattr(layer, "layer_idx", None), int):
                layer.layer_idx = position  # type: ignore[assignment]


def shorten(config: Any, depth: int, kept: Sequence[int], keys: Iterable[str]) -> None:
    """Let a configuration describe these of its ``depth`` blocks: counts by these keys, and every list with an entry a block."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and name not in _NOT_BY_BLOCK:
            setattr(config, name, [value[index] for index in kept])
    for key in keys:
        setattr(config, key, len(kept))
