"""Sets weights to zero and makes their part good in the weights still to come. No kernel here skips zeros: the speed is a simulation."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.transforms.moments import inverse_factor
from optkit.transforms.prune.contract import CalibratedPruning
from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest

_TOGETHER = 128  # columns whose mask is chosen at once, and whose feedback to the rest is given in one product


class Sparsegpt(CalibratedPruning):
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): the error of a layer's outputs on the calibration data is kept small."""

    damping: Annotated[float, Field(gt=0, le=1)] = Field(default=0.01, description="added to the diagonal, as a share of its mean")

    def pruned(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Return the weight with its zeros, the rest changed."""
        return sparsegpt(weight, gram, self.keeps, self.damping)


@torch.no_grad()
def sparsegpt(weight: Tensor, gram: Tensor, keeps: Pattern | float, damping: float = 0.01) -> Tensor:
    """Return weight (out, in) with zeros, chosen and made good for a small error of the outputs.

    The law: with H = gram + damping * mean(diag gram) * I and U the upper Cholesky factor of its inverse, the columns are taken from the
    left. Of each 128 columns those weights go whose w^2 / U[j, j]^2 is least, a share of all of them together, or of every M columns
    what N:M says. A weight w that goes changes those of its row still to come by -w / U[j, j] * U[j, k].

    Args:
        weight: (out, in), floats.
        gram: (in, in), the mean of x x^T over the calibration inputs.
        keeps: the share that goes, or the pattern of what stays; M of N:M divides the columns.
        damping: ten times as much, and again, where H is not positive definite.

    Raises:
        TransformError: the gram matrix is not finite, or has no factor.
    """
    if not bool(torch.isfinite(gram).all()):
        raise TransformError("the inputs on the calibration data are not all finite")
    factor = inverse_factor(gram.float(), damping)
    diagonal = factor.diagonal()
    left = weight.float().clone()
    together = _TOGETHER if not isinstance(keeps, Pattern) else max(1, _TOGETHER // keeps.of) * keeps.of
    for start in range(0, left.shape[1], together):
        end = min(start + together, left.shape[1])
        piece = left[:, start:end]
        errors = torch.empty_like(piece)
        doomed = torch.zeros_like(piece, dtype=torch.bool)
        if not isinstance(keeps, Pattern):
            doomed = smallest((piece / diagonal[start:end]).square(), keeps)
        for j in range(end - start):
            if isinstance(keeps, Pattern) and j % keeps.of == 0:
                columns = slice(j, j + keeps.of)
                doomed[:, columns] = beyond_pattern((piece[:, columns] / diagonal[start:end][columns]).square(), keeps)
            errors[:, j] = piece[:, j].masked_fill(~doomed[:, j], 0) / diagonal[start + j]
            piece[:, j].masked_fill_(doomed[:, j], 0)
            piece[:, j + 1 :].addr_(errors[:, j], factor[start + j, start + j + 1 : end], alpha=-1)
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return left.to(weight.dtype)
