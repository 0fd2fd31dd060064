"""AWQ: columns with large inputs are made larger before rounding, by a scale that moves into the layer before (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_GRID = 20
_LEAST = 1e-4
_JUDGED = 256  # rows of a weight that the grid looks at, evenly spread: the scale is common to all of them


@torch.no_grad()
def activation_scale(
    weights: Sequence[Tensor],
    gram: Tensor,
    magnitude: Tensor,
    rounded: Callable[[Tensor, Tensor], Tensor],
    even: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensor, float]:
    """Return the scale s (in,) for layers that read one input, and its output error as a share of that without a scale, at most 1.

    The law: s = magnitude^alpha, divided by the root of its largest times its least value; of alpha = 0, 0.05 ... 0.95 the one that
    minimizes the squared error of all the layers' outputs, sum of tr(D gram D^T) with D = rounded(W s) / s - W, on at most 256 rows
    of each W.

    Args:
        weights: (out, in) each.
        gram: (in, in), the mean of x x^T over the calibration inputs.
        magnitude: (in,), the mean of |x|.
        rounded: takes a scaled weight and the mean squares (in,) of its inputs, quantizes it, and returns what it then stands for.
        even: makes a scale equal where columns cannot differ.
    """
    judged = [_spread(weight).float() for weight in weights]
    squares = gram.diagonal()
    best, least, plain = torch.ones_like(magnitude), float("inf"), float("inf")
    for step in range(_GRID):
        scale = magnitude.clamp(min=_LEAST * float(magnitude.max()) or 1.0) ** (step / _GRID)
        scale = even(scale / (scale.max() * scale.min()).sqrt())
        error = sum(output_error(rounded(weight * scale, squares / scale.square()) / scale - weight, gram) for weight in judged)
        if step == 0:
            plain = error
        if error < least:
            best, least = scale, error
    return best, least / plain if plain else 1.0


def output_error(deviation: Tensor, gram: Tensor) -> float:
    """Return tr(D gram D^T): the mean squared error of the outputs, summed over them, for a deviation D (out, in) of the weight."""
    return float(((deviation @ gram) * deviation).sum(dtype=torch.float64))


def _spread(weight: Tensor) -> Tensor:
    return weight if len(weight) <= _JUDGED else weight[torch.linspace(0, len(weight) - 1, _JUDGED).long()]
