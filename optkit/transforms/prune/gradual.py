"""Zeros that grow in number while the rest learns: magnitude pruning by a cubic schedule, in a recipe or in any training loop."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import nn

from optkit.core.settings import Settings
from optkit.core.targets import Targets
from optkit.transforms.contract import Plan
from optkit.transforms.layers import weight_of
from optkit.transforms.prune.magnitude import Magnitude
from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest
from optkit.transforms.training.zeros import Zeros

Share = Annotated[float, Field(ge=0, le=1)]


def cubic(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Return the sparsity at a step: ``initial`` up to ``begin``, ``final`` from ``end`` on, and quickly at first between them.

    The law: s = final + (initial - final) * (1 - (step - begin) / (end - begin))^3 (Zhu and Gupta 2017, arXiv 1710.01878).
    """
    if step >= end:
        return final
    return final + (initial - final) * (1 - max(0, step - begin) / (end - begin)) ** 3


class GradualPruning(Settings):
    """Which weights go, how many in the end, and when. A pattern N:M is reached row by row: a growing share of the rows obeys it."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="share of zeros in the end; default: 0.5")
    pattern: str | None = Field(default=None, description="N:M in the end; instead of sparsity")
    begin: Share = Field(default=0.0, description="share of the training after which zeros begin")
    end: Share = Field(default=0.7, description="share of the training after which there are no more to come")
    every: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=10, description="steps from one choice of zeros to the next")
    targets: Targets = Field(default=Targets(), description="linear layers to prune")

    @model_validator(mode="after")
    def _in_time(self) -> GradualPruning:
        self.magnitude()
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} must come before end {self.end}")
        return self

    def check(self, plan: Plan) -> None:
        """Refuse what ``magnitude`` would refuse."""
        self.magnitude().check(plan)

    def schedule(self, module: nn.Module, steps: int) -> Schedule:
        """Return the schedule for a training of this module in so many steps."""
        return Schedule(module, self, steps)

    def magnitude(self) -> Magnitude:
        """Return the transform that would choose the last zeros at once."""
        return Magnitude(sparsity=self.sparsity, pattern=self.pattern, targets=self.targets)


class Schedule:
    """Sets weights to zero while a module trains: call ``step`` after every step of the optimizer. What is zero stays zero."""

    def __init__(self, module: nn.Module, settings: GradualPruning, steps: int) -> None:
        magnitude = settings.magnitude()
        self._begin = round(settings.begin * steps)
        self._end = max(self._begin + 1, round(settings.end * steps))
        self._every = settings.every
        self._keeps = magnitude.keeps
        self._weights = [weight_of(layer) for layer in magnitude.layers_of(module).values()]
        self._zeros = Zeros(module)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Set the zeros again, and choose further ones where it is time. Steps count from 1."""
        self._zeros.apply()
        if number == self._end or (self._begin <= number < self._end and (number - self._begin) % self._every == 0):
            for weight in self._weights:
                weight.masked_fill_(self._chosen(weight.abs().float(), number), 0)
            self._zeros.note()

    def _chosen(self, scores: torch.Tensor, number: int) -> torch.Tensor:
        if not isinstance(self._keeps, Pattern):
            return smallest(scores, cubic(number, self._begin, self._end, self._keeps))
        share = cubic(number, self._begin, self._end, 1.0)
        chosen = beyond_pattern(scores, self._keeps)
        chosen[round(share * len(chosen)) :] = False  # a pattern has no halves; rows take it up one after another
        return chosen
