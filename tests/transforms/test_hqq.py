"""Half-quadratic quantization, held against the paper's loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.int4 import dequantize_groups, quantize_groups
from optkit.transforms.quantize.hqq import quantize_hqq, shrink


def by_the_paper(group: Tensor) -> float:
    """Return the best point of one group, in float64: alternate shrinking and centering while the mean error falls."""
    w = group.double()
    scale = (w.max() - w.min()) / 15
    point, beta = -w.min() / scale, 10.0
    best, least = point, float("inf")
    for _ in range(21):
        q = (w / scale + point).round().clamp(0, 15)
        off = w - (q - point) * scale
        if off.abs().mean() >= least:
            break
        best, least = point, off.abs().mean()
        rest = off.sign() * (off.abs() - off.abs() ** -0.3 / beta).clamp(min=0)
        point, beta = (q - (w - rest) / scale).mean(), beta * 1.01
    return float(best)


def test_the_points_are_those_of_the_paper() -> None:
    weight = torch.randn(60, 64) * 3
    _, scale, point = quantize_hqq(weight, 64)
    expected = torch.tensor([by_the_paper(row) for row in weight])
    assert ((point.float()[:, 0] - expected).abs() < 0.05).float().mean() > 0.85  # float32 may end a search one round sooner
    torch.testing.assert_close(scale.float()[:, 0], (weight.amax(1) - weight.amin(1)) / 15, rtol=2**-8, atol=0)


def test_shrinking_takes_small_errors_for_nothing_and_spares_large_ones() -> None:
    x = torch.tensor([0.0, 0.01, -0.01, 5.0, -5.0])
    torch.testing.assert_close(shrink(x, 10.0), torch.tensor([0.0, 0.0, 0.0, 5 - 5**-0.3 / 10, -5 + 5**-0.3 / 10]))


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_mean_error_is_no_more_than_that_of_the_full_range(group_size: int) -> None:
    weight = torch.cat([torch.randn(40, 256), torch.randn(40, 256) ** 3])
    errors = []
    for made in (quantize_hqq(weight, group_size), quantize_groups(weight, group_size, clip_search=False)):
        errors.append((dequantize_groups(*made) - weight).abs().unflatten(1, (-1, group_size)).mean(-1))
    assert (errors[0] <= errors[1] * 1.05).all()  # the points are rounded to bfloat16 in the end
    assert errors[0].sum() < 0.99 * errors[1].sum()


def test_it_does_not_depend_on_which_rows_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 64)
    whole = quantize_hqq(weight, 32)
    monkeypatch.setattr("optkit.kernels.guards._CHUNK", 64 * 7)
    assert all(torch.equal(one, other) for one, other in zip(whole, quantize_hqq(weight, 32), strict=True))


def test_a_group_of_one_value_keeps_it() -> None:
    weight = torch.tensor([0.0, 0.1, -3.3])[:, None].expand(3, 64)
    torch.testing.assert_close(dequantize_groups(*quantize_hqq(weight, 32)), weight, rtol=2**-8, atol=0)


def test_nan_is_refused() -> None:
    weight = torch.randn(9, 64)
    weight[4, 40] = float("nan")
    with pytest.raises(TransformError, match="in 1 of 9 rows, first in row 4"):
        quantize_hqq(weight, 32)
