"""Sets weights to zero that are small for what they multiply. No kernel here skips zeros, so the speed of this is a simulation."""

from __future__ import annotations

import torch
from torch import Tensor

from optkit.transforms.prune.contract import CalibratedPruning
from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest_in_rows


class Wanda(CalibratedPruning):
    """Pruning by weight times input norm, compared within each row (Sun et al. 2023, arXiv 2306.11695). Nothing is made good."""

    def pruned(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Return the weight with its zeros."""
        return wanda(weight, gram.diagonal(), self.keeps)


@torch.no_grad()
def wanda(weight: Tensor, squares: Tensor, keeps: Pattern | float) -> Tensor:
    """Return weight (out, in) without those of the least |w| times the root mean square of its input.

    Args:
        weight: (out, in), floats.
        squares: (in,), the mean squares of the inputs.
        keeps: the share of every row that goes, or the pattern of what stays.
    """
    scores = weight.abs().float() * squares.float().clamp(min=0).sqrt()
    doomed = beyond_pattern(scores, keeps) if isinstance(keeps, Pattern) else smallest_in_rows(scores, keeps)
    return weight.masked_fill(doomed, 0)
