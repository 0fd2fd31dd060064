"""Scales that protect the columns with large inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optkit.kernels.int4 import dequantize_groups, quantize_groups
from optkit.transforms.quantize.awq import activation_scale, output_error


def nearest(weight: Tensor, squares: Tensor) -> Tensor:
    return dequantize_groups(*quantize_groups(weight, 32, clip_search=False))


def outlying(width: int = 64) -> Tensor:
    """Return (500, width) inputs of which each eighth column is thirty times as large."""
    x = torch.randn(500, width)
    x[:, ::8] *= 30
    return x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x / len(x), x.abs().mean(0)


def test_the_error_is_that_of_the_outputs_in_float64() -> None:
    x, deviation = outlying(), torch.randn(24, 64)
    expected = (x.double() @ deviation.double().T).square().sum() / len(x)
    assert output_error(deviation, moments(x)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_the_best_scale_of_the_grid_is_found() -> None:
    """All twenty are tried in float64, by the outputs themselves."""
    x, weights = outlying(), [torch.randn(24, 64), torch.randn(40, 64)]
    gram, magnitude = moments(x)
    scale, gain = activation_scale(weights, gram, magnitude, nearest)
    errors = []
    for alpha in torch.arange(20, dtype=torch.float64) / 20:
        trial = magnitude.double() ** alpha
        trial = (trial / (trial.max() * trial.min()).sqrt()).float()
        outputs = [(x / trial).double() @ nearest(weight * trial, x[0]).double().T - x.double() @ weight.double().T for weight in weights]
        errors.append(sum(float(output.square().sum()) for output in outputs))
    best = errors.index(min(errors)) / 20
    expected = magnitude**best
    torch.testing.assert_close(scale, expected / (expected.max() * expected.min()).sqrt(), rtol=1e-4, atol=0)
    assert gain == pytest.approx(min(errors) / errors[0], rel=1e-3)
    assert gain < 0.5


def test_inputs_of_one_size_need_no_scale() -> None:
    gram, magnitude = torch.eye(64), torch.ones(64)
    scale, gain = activation_scale([torch.randn(24, 64)], gram, magnitude, nearest)
    assert torch.equal(scale, torch.ones(64))
    assert gain == 1


def test_it_is_never_worse_than_no_scale_and_respects_what_is_shared() -> None:
    for _ in range(5):
        x = outlying() @ torch.randn(64, 64)
        pairs = torch.arange(64) // 2

        def even(scale: Tensor, pairs: Tensor = pairs) -> Tensor:
            return (torch.zeros(32).index_add_(0, pairs, scale) / 2)[pairs]

        scale, gain = activation_scale([torch.randn(24, 64)], *moments(x), nearest, even)
        assert gain <= 1
        assert torch.equal(scale[::2], scale[1::2])


def test_columns_without_inputs_and_a_layer_without_any_give_a_scale_that_is_finite() -> None:
    x = outlying()
    x[:, :5] = 0
    for inputs in (x, torch.zeros_like(x)):
        scale, gain = activation_scale([torch.randn(24, 64)], *moments(inputs), nearest)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert gain <= 1


def test_rows_are_sampled_evenly_where_there_are_many() -> None:
    x, seen = outlying(), []

    def watched(weight: Tensor, squares: Tensor) -> Tensor:
        seen.append(len(weight))
        return nearest(weight, squares)

    activation_scale([torch.randn(1000, 64), torch.randn(10, 64)], *moments(x), watched)
    assert set(seen) == {256, 10}
