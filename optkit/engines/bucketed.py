"""Items of a batch by length: each runs beside those about as long, and what was padding is not computed.

Sources: sorting by length, as in Khomenko et al. 2017 (arXiv 1708.05604).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_MASK = "attention_mask"


class BucketedForward:
    """Gives what another engine gives, from batches that are cut to what their masks ask for. ``computed`` counts positions."""

    def __init__(self, inner: Any, multiple: int) -> None:
        """Take the engine that computes, and what lengths are rounded up to a multiple of."""
        self.inner, self.multiple = inner, multiple
        self.computed = 0

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the output for one batch of inputs with their (b, t) ``attention_mask``, as for all of it at once.

        What a model says of a position that is padding is 0, and, where it is one number a position, the lowest there is.
        """
        mask = batch[_MASK]
        width = mask.shape[1]
        ends = (mask != 0) * torch.arange(1, width + 1)
        lengths = (-(-ends.amax(1).clamp_min(1) // self.multiple) * self.multiple).clamp_max(width)
        whole: list[Any] = []
        spec: Any = None
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            part = {name: tensor[rows, :length] if tensor.shape[:2] == mask.shape else tensor[rows] for name, tensor in batch.items()}
            self.computed += len(rows) * length
            leaves, spec = tree_flatten(self.inner.forward(part))
            whole = whole or [_room(leaf, len(mask), length, width) for leaf in leaves]
            for room, leaf in zip(whole, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    room[(rows, slice(0, length)) if _by_position(leaf, length) else rows] = leaf
        return tree_unflatten(whole, spec)


def _by_position(leaf: Tensor, length: int) -> bool:
    return leaf.ndim > 1 and leaf.shape[1] == length


def _room(leaf: Any, rows: int, length: int, width: int) -> Any:
    """Return where the outputs of all rows go."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not _by_position(leaf, length):
        return leaf.new_zeros(rows, *leaf.shape[1:])
    room = leaf.new_zeros(rows, width, *leaf.shape[2:])
    return room.fill_(torch.finfo(leaf.dtype).min) if leaf.ndim == 2 and leaf.is_floating_point() else room


def refusal(module: nn.Module) -> str | None:
    """Return why padding cannot be left out for this model, or None where it can."""
    generates: Any = getattr(module, "can_generate", None)
    if callable(generates) and generates():
        return "bucketing is for models that answer by one forward, and this one generates"
    if _MASK not in inspect.signature(module.forward).parameters:
        return f"{type(module).__name__} takes no {_MASK}, and what is padding is not known"
    if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
        return "its recurrent layers run over the padding, and their states would be others without it"
    return None
