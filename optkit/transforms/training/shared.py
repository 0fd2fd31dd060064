"""Steps that several processes take together: each its rows of a batch, with the gradients added up by accelerate.

The same weights come out of it everywhere, and but for rounding the same as from one process, which is the usual case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.group import Group


class SharedSteps:
    """The part of one process in every step."""

    def __init__(self, group: Group, parameters: Sequence[nn.Parameter]) -> None:
        self._group, self._parameters = group, parameters

    @property
    def leads(self) -> bool:
        """Whether this is the process that keeps checkpoints."""
        return self._group.rank == 0

    def begin(self) -> None:
        """Begin from the weights of the first process, wherever others' differ in their last bits."""
        if self._group.size > 1:
            from accelerate.utils import broadcast

            for parameter in self._parameters:
                parameter.data.copy_(broadcast(parameter.data.clone()))

    def agreed(self, losses: list[float]) -> list[float]:
        """Return the losses of steps that were taken before, which all processes must have found alike.

        Raises:
            TransformError: they have not.
        """
        counts = set(self._group.join([len(losses)]))
        if len(counts) > 1:
            raise TransformError(f"the processes have found checkpoints after {sorted(counts)} steps; begin a new run, without --resume")
        return losses

    def draw(self, seed: int, step: int) -> None:
        """Draw other numbers in each process, and the same ones when a step is done again."""
        if self._group.size > 1:
            torch.manual_seed(((seed * 1_000_003 + step) * self._group.size + self._group.rank) % 2**63)

    def rows(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], float]:
        """Return this process's rows of a batch, and their share of it."""
        if self._group.size == 1:
            return batch, 1.0
        count = len(next(iter(batch.values())))
        own = self._group.rows(count)
        return {name: tensor[own] for name, tensor in batch.items()}, (own.stop - own.start) / count

    def add_up(self, loss: float) -> float:
        """Add up the gradients of all processes, and return the sum of their shares of the loss."""
        if self._group.size == 1:
            return loss
        from accelerate.utils import reduce

        gradients = [parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad for parameter in self._parameters]
        flat = torch.cat([torch.tensor([loss]), *(gradient.flatten().float() for gradient in gradients)])
        flat = reduce(flat, reduction="sum")
        parts = flat[1:].split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return float(flat[0])
