"""Pruned weights that stay zero while others train: by hand in any loop, or as a callback of the Trainer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Zeros:
    """The weights of a module that are zero now. Call ``apply`` after every step of an optimizer.

    Only matrices count, and only trainable ones: a bias of zeros may have been made so to be learned.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._masks: dict[nn.Parameter, Tensor] = {}
        self.note()

    def note(self) -> None:
        """Take the weights that have become zero since into account."""
        for parameter in self._module.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                zero = parameter.detach() == 0
                if bool(zero.any()):
                    self._masks[parameter] = zero

    @torch.no_grad()
    def apply(self) -> None:
        """Set them to zero again."""
        for parameter, zero in self._masks.items():
            parameter.masked_fill_(zero, 0)

    def __len__(self) -> int:
        return sum(int(zero.sum()) for zero in self._masks.values())
