from __future__ import annotations

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.kernels.int4 import Int4Linear, dequantize_groups, int4_linear_reference, quantize_groups
from optkit.kernels.layout import groups_from_kernel, groups_to_kernel, pack_nibbles, unpack_nibbles


def squared_error(weight: torch.Tensor, group_size: int, clip_search: bool) -> torch.Tensor:
    q, scale, point = quantize_groups(weight, group_size, clip_search)
    error = dequantize_groups(q, scale, point, torch.float64) - weight.double()
    return error.square().unflatten(1, (-1, group_size)).sum(dim=-1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_without_search_no_weight_is_off_by_much_more_than_half_a_scale(group_size: int) -> None:
    weight = torch.randn(50, 256) * torch.logspace(-4, 4, 50)[:, None] + 0.1
    q, scale, point = quantize_groups(weight, group_size, clip_search=False)
    assert q.shape == (50, 128) and q.dtype == torch.uint8
    assert scale.shape == point.shape == (50, 256 // group_size) and scale.dtype == point.dtype == torch.bfloat16
    error = (dequantize_groups(q, scale, point) - weight).abs().unflatten(1, (-1, group_size))
    assert (error <= scale.float().abs()[..., None] * (0.56 + point.float().abs()[..., None] / 128)).all()


def test_the_search_never_makes_a_group_worse_and_mostly_better() -> None:
    weight = torch.cat([torch.randn(40, 256), torch.randn(40, 256) ** 3, torch.rand(40, 256) + 5])
    plain, searched = squared_error(weight, 64, False), squared_error(weight, 64, True)
    assert (searched <= plain * 1.0001 + 1e-12).all()
    assert searched.sum() < 0.97 * plain.sum()


def test_a_group_of_one_value_keeps_it_to_bfloat16() -> None:
    weight = torch.tensor([0.0, 0.1, -3.3, 1e-30, 1e30])[:, None].expand(5, 64)
    torch.testing.assert_close(dequantize_groups(*quantize_groups(weight, 32)), weight, rtol=2**-8, atol=0)


def test_four_bytes_a_group_are_all_that_is_added() -> None:
    q, scale, point = quantize_groups(torch.randn(32, 256), 64)
    assert (q.nbytes + scale.nbytes + point.nbytes) / (32 * 256) == 0.5625


@pytest.mark.parametrize(
    ("in_features", "group_size", "remedy"), [(96, 64, "use 32"), (256, 96, "use 32 or 64 or 128"), (40, 32, "exclude")]
)
def test_int4_refuses_a_group_size_that_does_not_divide(in_features: int, group_size: int, remedy: str) -> None:
    with pytest.raises(TransformError, match=f"group size {group_size} .* {in_features}; .*{remedy}"):
        quantize_groups(torch.randn(4, in_features), group_size)
    with pytest.raises(TransformError, match=remedy):
        Int4Linear.empty(in_features, 4, group_size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_with_the_row(bad: float) -> None:
    weight = torch.randn(9, 64)
    weight[4, 40] = bad
    for search in (False, True):
        with pytest.raises(TransformError, match="in 1 of 9 rows, first in row 4"):
            quantize_groups(weight, 32, search)


def test_the_layout_of_the_kernels_is_exact_both_ways() -> None:
    for rows, cols, group_size in [(1, 32, 32), (16, 64, 64), (33, 256, 128), (100, 96, 32)]:
        q = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
        scale, point = (torch.randn(rows, cols // group_size).bfloat16() for _ in range(2))
        packed = pack_nibbles(q)
        torch.testing.assert_close(unpack_nibbles(packed), q, rtol=0, atol=0)
        kernel = groups_to_kernel(packed, scale, point)
        assert kernel.shape == (-(-rows // 16), cols // group_size, 8 * group_size + 64)
        for back, tensor in zip(groups_from_kernel(kernel, rows, cols), (packed, scale, point), strict=True):
            torch.testing.assert_close(back, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_reference_and_the_layer_agree(backend: str, group_size: int) -> None:
    weight, bias = torch.randn(40, 256), torch.randn(40)
    layer = Int4Linear.from_weight(weight, bias, group_size)
    for rows, limit in ((1, 2e-3), (20, 0.2)):  # one row has 16 bits, many may have the 8 of bfloat16
        x = torch.randn(rows, 256)
        torch.testing.assert_close(layer(x), int4_linear_reference(x, *quantize_groups(weight, group_size), bias), rtol=0, atol=limit)


def test_the_bytes_for_one_token_are_counted() -> None:
    layer = Int4Linear.from_linear(nn.Linear(128, 8), group_size=64)
    assert layer.weight_bytes == 8 * 64 + 8 * 2 * 4 + 8 * 4


def test_scales_in_float16_run_too(backend: str) -> None:
    q, scale, point = quantize_groups(torch.randn(40, 256), 64)
    tensors = (q, scale.half(), point.half())
    layer = Int4Linear(tensors, None, 64, torch.float32)
    assert layer.layout()["scale_dtype"] == "float16"
    for rows, limit in ((1, 2e-3), (20, 0.2)):  # one row has 16 bits, many may have the 8 of bfloat16
        x = torch.randn(rows, 256)
        torch.testing.assert_close(layer(x), int4_linear_reference(x, *tensors), rtol=0, atol=limit)
    for back, tensor in zip(layer.tensors(), tensors, strict=True):
        torch.testing.assert_close(back, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [32, 128, 192, 768])
def test_inputs_are_rounded_to_steps_of_their_own_columns(backend: str, group_size: int) -> None:
    layer = Int4Linear.from_weight(torch.randn(20, 768), None, group_size)
    weight = layer.dequantize(torch.float64)
    columns = group_size if group_size <= 128 else 64
    for size in (1.0, 1e-20, 1e20):
        x = torch.randn(5, 768) * size
        x[:, 40] *= 1000  # one outlier
        step = x.double().unflatten(1, (-1, columns)).abs().amax(-1) / 32767
        reach = (step / 2) @ weight.abs().unflatten(1, (-1, columns)).sum(-1).T
        exact = x.double() @ weight.T
        assert ((layer(x) - exact).abs() <= 1.01 * reach + 1e-6 * x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)).all()
