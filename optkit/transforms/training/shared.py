"""Steps that several processes take together: each its rows of a batch, with the gradients added up by accelerate.

The same weights come out of it everywhere, and but for rounding the same as from one process, which is the usual case.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optkit.core.group import Group


class SharedSteps:
    """The part of one process in every step; it begins from the weights of the first, wherever others' differ in their last bits.

    ``trained`` computes the loss, ``parameters`` are what the optimizer changes here, and ``kept`` is what a checkpoint holds.
    """

    def __init__(self, group: Group, student: nn.Module) -> None:
        self._group = group
        self.trained = self.kept = student
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if group.size > 1:
            from accelerate.utils import broadcast

            for parameter in self.parameters:
                parameter.data.copy_(broadcast(parameter.data.clone()))

    def owns_checkpoints(self) -> str:
        """Return the name of the folder for checkpoints, beneath that of the training; all processes have the same."""
        return ""

    def is_due(self, own: bool) -> bool:
        """Say whether this process keeps a checkpoint now, where by its own clock one is due."""
        return own and self._group.rank == 0

    def common(self, steps: int) -> int:
        """Return how many steps all processes have kept, of which this one has kept so many."""
        return int(min(self._group.join([steps])))

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

        gradients = [parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad for parameter in self.parameters]
        flat = torch.cat([torch.tensor([loss]), *(gradient.flatten().float() for gradient in gradients)])
        flat = reduce(flat, reduction="sum")
        parts = flat[1:].split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return float(flat[0])

    def forget(self) -> None:
        """Let go of all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def end(self) -> None:
        """Leave the student with its trained weights."""
