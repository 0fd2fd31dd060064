"""Sets weights to zero that are small for what they multiply. No kernel here skips zeros, so the speed of this is a simulation."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from optkit.transforms.prune.contract import CalibratedPruning
from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest, smallest_in_rows


class Wanda(CalibratedPruning):
    """Pruning by weight times input norm, compared within each row (Sun et al. 2023, arXiv 2306.11695). Nothing is made good."""

    compare: Literal["row", "layer"] = Field(
        default="row", description="whether each row loses this share, as published, or the layer as a whole"
    )

    @model_validator(mode="after")
    def _pattern_is_within_rows(self) -> Self:
        if self.pattern is not None and self.compare == "layer":
            raise ValueError("a pattern holds within each row, so there is no comparison over the layer; leave out compare")
        return self

    def pruned(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Return the weight with its zeros."""
        return wanda(weight, gram.diagonal(), self.keeps, self.compare)


@torch.no_grad()
def wanda(weight: Tensor, squares: Tensor, keeps: Pattern | float, compare: Literal["row", "layer"] = "row") -> Tensor:
    """Return weight (out, in) without those of the least |w| times the root mean square of its input.

    Args:
        weight: (out, in), floats.
        squares: (in,), the mean squares of the inputs.
        keeps: the share of every row that goes, or of the whole weight; or the pattern of what stays.
        compare: with a share, whether scores are compared within each row or within the whole weight.
    """
    scores = weight.abs().float() * squares.float().clamp(min=0).sqrt()
    if isinstance(keeps, Pattern):
        doomed = beyond_pattern(scores, keeps)
    else:
        doomed = smallest_in_rows(scores, keeps) if compare == "row" else smallest(scores, keeps)
    return weight.masked_fill(doomed, 0)
