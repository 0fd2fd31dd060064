"""The search for scales: with the point fixed, and with columns that count differently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.int4 import Int4Linear, dequantize_groups, int4_linear_reference, quantize_groups


def errors(weight: Tensor, group_size: int, importance: Tensor | None = None, **settings: bool) -> Tensor:
    """Return the squared error of each group in float64, with columns counted alike or by the importance."""
    made = dequantize_groups(*quantize_groups(weight, group_size, importance=importance, **settings), torch.float64)
    return (made - weight.double()).square().unflatten(1, (-1, group_size)).sum(-1)


def weights() -> Tensor:
    return torch.cat([torch.randn(40, 128), torch.randn(40, 128) ** 3, torch.rand(40, 128) - 0.9])


def test_a_symmetric_group_has_its_point_at_8_and_comes_near_the_best_of_many_scales() -> None:
    weight = weights()
    _, scale, point = quantize_groups(weight, 32, symmetric=True)
    assert (point == 8).all()
    groups = weight.double().unflatten(1, (-1, 32))
    best = torch.full(groups.shape[:2], float("inf")).double()
    for share in torch.linspace(0.4, 1.1, 141).tolist():
        for sign in (1, -1):
            step = groups.abs().amax(-1, keepdim=True) / 7.5 * share * sign
            made = ((groups / step + 8).round().clamp(0, 15) - 8) * step
            best = torch.minimum(best, (made - groups).square().sum(-1))
    found = errors(weight, 32, symmetric=True)
    assert (found <= errors(weight, 32, symmetric=True, clip_search=False) * 1.0001).all()
    assert found.sum() < 1.12 * best.sum()
    assert (scale < 0).any()  # the eighth level is on the side of a positive weight


def test_without_search_a_symmetric_group_clips_nothing() -> None:
    weight = weights()
    q, scale, point = quantize_groups(weight, 64, clip_search=False, symmetric=True)
    off = (dequantize_groups(q, scale, point) - weight).abs().unflatten(1, (-1, 64))
    assert (off <= scale.float().abs()[..., None] * 0.54).all()  # half a step, and bfloat16


@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_that_count_more_come_out_better(symmetric: bool) -> None:
    weight, importance = weights(), torch.logspace(-2, 2, 128)[torch.randperm(128)]

    def weighted(importance: Tensor | None, counted: Tensor) -> float:
        made = dequantize_groups(*quantize_groups(weight, 32, symmetric=symmetric, importance=importance))
        return float(((made - weight).square() * counted).sum())

    assert weighted(importance, importance) < 0.9 * weighted(None, importance)
    assert weighted(importance, torch.ones(128)) >= weighted(None, torch.ones(128))


def test_an_importance_of_one_changes_nothing() -> None:
    weight = weights()
    for symmetric in (False, True):
        pairs = zip(
            quantize_groups(weight, 32, True, symmetric), quantize_groups(weight, 32, True, symmetric, torch.ones(128)), strict=True
        )
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_in_symmetric_groups_too(bad: float) -> None:
    weight = torch.randn(9, 64)
    weight[4, 40] = bad
    for search in (False, True):
        with pytest.raises(TransformError, match="in 1 of 9 rows, first in row 4"):
            quantize_groups(weight, 32, search, symmetric=True)


def test_a_group_of_zeros_stays_zero() -> None:
    for symmetric in (False, True):
        assert (dequantize_groups(*quantize_groups(torch.zeros(3, 64), 32, symmetric=symmetric)) == 0).all()


@pytest.mark.parametrize(("width", "group_size"), [(96, 96), (320, 160), (224, 224), (1056, 352)])
def test_the_kernels_take_every_multiple_of_32(backend: str, width: int, group_size: int) -> None:
    weight, bias = torch.randn(40, width), torch.randn(40)
    layer = Int4Linear.from_weight(weight, bias, group_size)
    made = quantize_groups(weight, group_size)
    for rows, limit in ((1, 1e-4 * width**0.5), (20, 0.02 * width**0.5)):
        x = torch.randn(rows, width)
        torch.testing.assert_close(layer(x), int4_linear_reference(x, *made, bias), rtol=0, atol=limit)
    for back, tensor in zip(layer.tensors(), made, strict=True):
        assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("width", "group_size", "words"),
    [
        (128, 48, "group size 48 has no kernel for in_features 128, it is no multiple of 32; use 32 or 64 or 128$"),
        (256, 96, "group size 96 does not divide in_features 256; use 32 or 64 or 128 or 256$"),
        (96, 0, "group size 0 has no kernel for in_features 96, it is no multiple of 32; use 32 or 96$"),
        (100, 32, "no group size divides it, as all are multiples of 32: exclude this layer or use int8$"),
    ],
)
def test_other_sizes_are_refused_with_those_that_work(width: int, group_size: int, words: str) -> None:
    with pytest.raises(TransformError, match=words):
        quantize_groups(torch.randn(4, width), group_size)
