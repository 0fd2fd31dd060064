"""HQQ, half-quadratic quantization: the point of each group is optimized for a norm that forgives outliers (Badri & Shaji 2023).

No data is needed. The scale stays that of the full range, as in the paper (mobiusml.github.io/hqq_blog): nothing is clipped, so that
wide groups come out coarse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optkit.kernels.clipping import Rounded, round_to, search
from optkit.kernels.guards import refuse_non_finite, refuse_non_matrix, row_chunks
from optkit.kernels.int4 import refuse_group_size
from optkit.kernels.layout import pack_nibbles

NORM, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


@torch.no_grad()
def quantize_hqq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, scale and point as ``quantize_groups`` does.

    The law: scale = range / 15; then, alternately, e = shrink(w - w') with shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta), p = 0.7,
    and point = mean(q - (w - e) / scale), beta growing by 1 % a round from 10; a group ends after 20 rounds, or when its mean |w - w'| no
    longer falls (the paper stops the whole matrix). The point is rounded to bfloat16 before the last numbers are chosen.

    Args:
        weight: (out, in), floats.
        group_size: columns that share a scale and a point.

    Raises:
        TransformError: see ``quantize_groups``.
    """
    refuse_non_matrix(weight)
    refuse_group_size(weight.shape[1], group_size)
    parts = [_half_quadratic(rows.reshape(len(rows), -1, group_size)) for rows in row_chunks(weight)]
    q, scale, point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    refuse_non_finite(scale.float() + point.float())
    return q, scale, point


def shrink(x: Tensor, beta: float, norm: float = NORM) -> Tensor:
    """Return sign(x) max(0, |x| - |x|^(norm - 1) / beta): what minimizes |e|^norm + beta / 2 (e - x)^2, nearly; 0 stays 0."""
    size = x.abs()
    return x.sign() * (size - size.pow(norm - 1) / beta).clamp_(min=0).nan_to_num_(nan=0.0)


def _half_quadratic(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    start = search(groups, ())
    step = start.scale.float()[..., None]
    safe = torch.where(step != 0, step, 1)
    varied = groups.amax(dim=-1) > groups.amin(dim=-1)  # a group of one value is exact already
    trial = start._replace(point=torch.where(varied, -groups.amin(dim=-1) / safe[..., 0], start.point.float()))
    best, open_still, least, beta = trial.point, varied, _mean_error(groups, trial), BETA
    for _ in range(ROUNDS):
        numbers = trial.numbers
        rest = shrink(groups - (numbers - trial.point[..., None]) * step, beta)
        trial = round_to(groups, start.scale, (numbers - (groups - rest) / safe).mean(dim=-1))
        error = _mean_error(groups, trial)
        open_still = open_still & (error < least)
        if not bool(open_still.any()):
            break
        best, least = torch.where(open_still, trial.point, best), torch.where(open_still, error, least)
        beta *= GROWTH
    final = round_to(groups, start.scale, best.to(torch.bfloat16))
    return pack_nibbles(final.q.flatten(1)), final.scale, final.point


def _mean_error(groups: Tensor, trial: Rounded) -> Tensor:
    made = (trial.numbers - trial.point.float()[..., None]) * trial.scale.float()[..., None]
    return (groups - made).abs_().mean(dim=-1)
