"""Error feedback, held against a float64 reference that solves for the later columns anew after each one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.int4 import dequantize_groups, quantize_groups
from optkit.kernels.layout import unpack_nibbles
from optkit.transforms.quantize.awq import output_error
from optkit.transforms.quantize.gptq import gptq, importance_of


def inputs(width: int, count: int = 400) -> Tensor:
    """Return (count, width) inputs whose columns go together and differ in size."""
    return torch.randn(count, width) @ torch.randn(width, width) * torch.logspace(-1, 1, width)[torch.randperm(width)]


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def by_solving(weight: Tensor, gram: Tensor, group_size: int, act_order: bool) -> Tensor:
    """Round a column, then minimize tr(D H D^T) over all later columns by solving H_LL d_L = -H_Lj d_j, in float64."""
    importance = importance_of(gram.diagonal())
    _, scale, point = (tensor.double() for tensor in quantize_groups(weight, group_size, importance=importance))
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram)).double()
    left, q = weight.double().clone(), torch.zeros_like(weight)
    later = (importance.argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))).tolist()
    while later:
        j, *later = later
        group = j // group_size
        q[:, j] = (left[:, j] / scale[:, group] + point[:, group]).round().clamp(0, 15)
        off = (q[:, j] - point[:, group]) * scale[:, group] - left[:, j]
        if later:
            left[:, later] -= off[:, None] * torch.linalg.solve(h[later][:, later], h[later, j])
    return q


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (160, 32), (192, 192)])
def test_the_numbers_are_those_of_solving_anew_after_each_column(width: int, group_size: int, act_order: bool) -> None:
    weight, gram = torch.randn(24, width), gram_of(inputs(width))
    q, scale, point = gptq(weight, gram, group_size, act_order=act_order)
    numbers, expected = unpack_nibbles(q).float(), by_solving(weight, gram, group_size, act_order)
    rows = (numbers != expected).any(1)  # a tie that falls the other way in float32 changes all that follows in its row
    assert rows.float().mean() < 0.2
    reference = (expected - point.float().repeat_interleave(group_size, 1)) * scale.float().repeat_interleave(group_size, 1)
    mine, its = (output_error(made - weight, gram) for made in (dequantize_groups(q, scale, point), reference))
    assert mine == pytest.approx(its, rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_outputs_are_off_by_less_than_those_of_rounding_to_nearest(group_size: int, symmetric: bool) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weight, x = torch.randn(48, 128), inputs(128)
        nearest = dequantize_groups(*quantize_groups(weight, group_size, symmetric=symmetric))
        made = dequantize_groups(*gptq(weight, gram_of(x), group_size, symmetric))
        assert (x @ (made - weight).T).square().sum() < 0.7 * (x @ (nearest - weight).T).square().sum()


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_to_nearest() -> None:
    weight, gram = torch.randn(16, 64), torch.eye(64)
    for one, other in zip(gptq(weight, gram, 32), quantize_groups(weight, 32), strict=True):
        assert torch.equal(one, other)


def test_columns_without_inputs_and_one_input_seen_alone_are_no_trouble() -> None:
    weight, x = torch.randn(16, 64), torch.zeros(1, 64)
    x[0, :32] = torch.randn(32)
    for gram in (gram_of(x), torch.zeros(64, 64)):
        q, scale, point = gptq(weight, gram, 32)
        nearest = unpack_nibbles(quantize_groups(weight, 32, importance=importance_of(gram.diagonal()))[0])
        assert torch.equal(unpack_nibbles(q)[:, 32:], nearest[:, 32:])
        assert torch.isfinite(dequantize_groups(q, scale, point)).all()


def test_a_gram_matrix_that_rounding_made_indefinite_is_damped_more() -> None:
    gram = gram_of(inputs(64)) - 0.05 * torch.eye(64) * gram_of(inputs(64)).diagonal().mean()
    assert torch.isfinite(dequantize_groups(*gptq(torch.randn(8, 64), gram, 32))).all()
    with pytest.raises(TransformError, match="no Cholesky factor; give more calibration data"):
        gptq(torch.randn(8, 64), torch.full((64, 64), -1.0) + 2 * torch.eye(64), 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_in_weights_or_inputs_are_refused(bad: float) -> None:
    weight, gram = torch.randn(8, 64), torch.eye(64)
    weight[3, 5] = bad
    with pytest.raises(TransformError, match="in 1 of 8 rows, first in row 3"):
        gptq(weight, gram, 32)
    gram[0, 0] = bad
    with pytest.raises(TransformError, match="inputs on the calibration data are not all finite"):
        gptq(torch.randn(8, 64), gram, 32)
