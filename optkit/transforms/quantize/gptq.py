"""GPTQ: column by column, the error of rounding is made good in the columns still to come (Frantar et al. 2022, arXiv 2210.17323).

It minimizes the error of a layer's outputs on the calibration data, not that of its weights, and so depends on that data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.clipping import LEVELS
from optkit.kernels.int4 import quantize_groups
from optkit.kernels.layout import pack_nibbles
from optkit.transforms.moments import inverse_factor

_TOGETHER = 128  # columns whose feedback to the rest is given in one product
_CLOSE = 16  # columns of those whose feedback to one another is given at once; the rest of the 128 hear of all 16 in one product


@torch.no_grad()
def gptq(
    weight: Tensor, gram: Tensor, group_size: int, symmetric: bool = False, act_order: bool = True, damping: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, scale and point as ``quantize_groups`` does, chosen for a small error of the outputs.

    The law: with H = gram + damping * mean(diag gram) * I and U the upper Cholesky factor of its inverse, the columns are taken in
    turn; a column w is rounded to w', and the columns k still to come change by -(w - w') / U[j, j] * U[j, k]. That is the change that
    minimizes tr(D H D^T) for the deviation D when all later columns are free. The groups' scales are fixed before, by the clip search
    with diag H for the importance of the columns.

    Args:
        weight: (out, in), floats.
        gram: (in, in), the mean of x x^T over the calibration inputs.
        group_size: columns that share a scale.
        symmetric: the point is 8.
        act_order: take the columns by falling diag H instead of from the left; the groups stay where they are.
        damping: added to the diagonal, as a share of its mean; ten times as much, and again, where H is not positive definite.

    Raises:
        TransformError: see ``quantize_groups``; or the gram matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise TransformError("the inputs on the calibration data are not all finite")
    importance = importance_of(gram.diagonal())
    _, scale, point = quantize_groups(weight, group_size, symmetric=symmetric, importance=importance)
    order = importance.argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))
    factor = inverse_factor(gram.float()[order][:, order], damping)
    left = weight.float().T[order].contiguous()  # (in, out): a column of the weight is a row here
    steps, points = scale.float().T.contiguous(), point.float().T.contiguous()
    divisors = torch.where(steps != 0, steps, 1)
    q = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, len(left), _TOGETHER):
        end = min(start + _TOGETHER, len(left))
        errors = torch.empty(end - start, left.shape[1])
        for near in range(start, end, _CLOSE):
            far = min(near + _CLOSE, end)
            for j in range(near, far):
                group = int(order[j]) // group_size
                step, base = steps[group], points[group]
                numbers = (left[j] / divisors[group]).add_(base).round_().clamp_(0, LEVELS)
                error = errors[j - start]
                torch.sub(left[j], (numbers - base).mul_(step), out=error).div_(float(factor[j, j]))
                left[j + 1 : far].addr_(factor[j, j + 1 : far], error, alpha=-1)
                q[order[j]] = numbers.to(torch.uint8)
            left[far:end].addmm_(factor[near:far, far:end].T, errors[near - start : far - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return pack_nibbles(q.T.contiguous()), scale, point


def importance_of(squares: Tensor) -> Tensor:
    """Return mean squares of inputs (in,), a little more than 0 where there are none, so that such a column is still rounded to nearest."""
    mean = squares.float().mean()
    return squares.float() + 1e-3 * mean if bool(mean > 0) else torch.ones_like(squares)
