"""Which weights go: the smallest by some score, a share of them or all but N of every M columns. Counts are exact, ties included."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import torch
from torch import Tensor

_FORM = r"([1-9][0-9]?):([1-9][0-9]?)"
_MOST = 64


class Pattern(NamedTuple):
    """At most ``kept`` of every ``of`` consecutive columns of a row are not zero."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pattern written as ``2:4``.

        Raises:
            ValueError: it is none, or keeps everything.
        """
        found = re.fullmatch(_FORM, text)
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of <= _MOST:
            raise ValueError(f"{text[:20]!r} is no pattern: write 2:4 for 2 of every 4 columns kept; the second number is at most {_MOST}")
        return cls(kept, of)


def smallest(scores: Tensor, share: float) -> Tensor:
    """Return a mask of exactly ``round(share * n)`` of the n scores, the smallest; of equal ones the first."""
    doomed = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    doomed[scores.flatten().argsort(stable=True)[: round(share * scores.numel())]] = True
    return doomed.view(scores.shape)


def smallest_in_rows(scores: Tensor, share: float) -> Tensor:
    """Return a mask of exactly ``round(share * columns)`` scores in every row (out, in), the smallest."""
    order = scores.argsort(dim=1, stable=True)[:, : round(share * scores.shape[1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def beyond_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return a mask (out, in) of all but the ``kept`` largest scores of every ``of`` columns, which divide the columns."""
    grouped = scores.unflatten(1, (-1, pattern.of))
    order = grouped.argsort(dim=-1, stable=True)[..., : pattern.of - pattern.kept]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True).flatten(1)
