"""The search for scale and point of a group of int4 numbers: smaller ranges clip a few weights and serve the others better."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 15
MIDDLE = 8.0  # the point of symmetric groups
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


class Rounded(NamedTuple):
    """Quantized groups: w ~ (numbers - point) * scale."""

    numbers: Tensor  # float32 (rows, groups, group_size), whole: 0 .. 15
    scale: Tensor  # bfloat16 (rows, groups), as point
    point: Tensor
    error: Tensor  # float32 (rows, groups): the squared error, weighted by the importance

    @property
    def q(self) -> Tensor:
        """The numbers as uint8."""
        return self.numbers.to(torch.uint8)


class _Choice(NamedTuple):
    scale: Tensor
    point: Tensor
    error: Tensor

    def better(self, other: Rounded) -> _Choice:
        """Return of each group the one with less error, this one where they are equal."""
        wins = other.error < self.error
        return _Choice(*(torch.where(wins, new, old) for old, new in zip(self, other[1:], strict=True)))


def search(groups: Tensor, shrinks: tuple[float, ...] = SHRINKS, importance: Tensor | None = None) -> Rounded:
    """Quantize float32 (rows, groups, group_size) with a free point.

    The range of a group is divided by 15; then the same is tried for the shrunken ranges, each time fitting scale and point to the
    rounded numbers by least squares, and what gives the least error is kept.

    Args:
        groups: the weights.
        shrinks: factors of the range to try; none: no search.
        importance: (groups, group_size), what a squared error in a column counts, such as the mean square of its inputs; None: all alike.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    first = _round(groups, (high / LEVELS - low / LEVELS), low, importance)
    if not shrinks:
        return first
    best = _Choice(*first[1:])
    for shrink in shrinks:
        middle, reach = (low / 2 + high / 2), (high / 2 - low / 2) * shrink
        trial = first if shrink == 1 else _round(groups, reach * 2 / LEVELS, middle - reach, importance)
        best = best.better(trial).better(_fit(groups, trial.numbers, importance))
    return round_to(groups, best.scale, best.point, importance)


def search_symmetric(groups: Tensor, shrinks: tuple[float, ...] = SHRINKS, importance: Tensor | None = None) -> Rounded:
    """Quantize float32 (rows, groups, group_size) with the point at 8; see ``search``.

    Tried are scales that take the largest magnitude to 7 levels from the point, on either side, or to the eighth on its own side,
    where there is one more; such a scale is negative if that weight is positive.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    largest = torch.maximum(high, -low)
    eighth = torch.where(high > -low, -largest, largest) / MIDDLE
    first = _round_at_middle(groups, largest / (LEVELS - MIDDLE), importance)
    if not shrinks:
        return first
    best = _Choice(*first[1:])
    for shrink in shrinks:
        for scale in (largest / (LEVELS - MIDDLE) * shrink, eighth * shrink):
            trial = _round_at_middle(groups, scale, importance)
            best = best.better(trial).better(_fit_at_middle(groups, trial.numbers, importance))
    return round_to(groups, best.scale, best.point, importance)


def round_to(groups: Tensor, scale: Tensor, point: Tensor, importance: Tensor | None = None) -> Rounded:
    """Round float32 (rows, groups, group_size) to the nearest numbers of a given bfloat16 scale and point (rows, groups)."""
    step, base = scale.float()[..., None], point.float()[..., None]
    numbers = (groups / torch.where(step != 0, step, 1)).add_(base).round_().clamp_(0, LEVELS)
    error = (numbers - base).mul_(step).sub_(groups).square_()
    return Rounded(numbers, scale, point, _summed(error, importance))


def _round(groups: Tensor, scale: Tensor, low: Tensor, importance: Tensor | None) -> Rounded:
    """Quantize with a scale, and with 0 standing for ``low``."""
    level = scale.abs() <= low.abs() * 2**-20  # too little range for the point to be a number of use
    scale = torch.where(level, low, scale).to(torch.bfloat16)
    step = scale.float()
    point = torch.where(level, 0, -low / torch.where(step != 0, step, 1)).to(torch.bfloat16)
    return round_to(groups, scale, point, importance)


def _round_at_middle(groups: Tensor, scale: Tensor, importance: Tensor | None) -> Rounded:
    rounded = scale.to(torch.bfloat16)
    return round_to(groups, rounded, torch.full_like(rounded, MIDDLE), importance)


def _fit(groups: Tensor, numbers: Tensor, importance: Tensor | None) -> Rounded:
    """Fit scale and point to given numbers by least squares, then round anew."""
    total = groups.shape[-1] if importance is None else importance.sum(dim=-1)
    mean, center = _summed(numbers, importance) / total, _summed(groups, importance) / total
    numbers = numbers - mean[..., None]
    spread, product = _summed(numbers.square(), importance), _summed((groups - center[..., None]).mul_(numbers), importance)
    scale = product / torch.where(spread > 0, spread, 1)
    return _round(groups, scale, center - scale * mean, importance)


def _fit_at_middle(groups: Tensor, numbers: Tensor, importance: Tensor | None) -> Rounded:
    numbers = numbers - MIDDLE
    spread, product = _summed(numbers.square(), importance), _summed(numbers * groups, importance)
    return _round_at_middle(groups, product / torch.where(spread > 0, spread, 1), importance)


def _summed(values: Tensor, importance: Tensor | None) -> Tensor:
    return values.sum(dim=-1) if importance is None else (values * importance).sum(dim=-1)
