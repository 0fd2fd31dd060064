"""Layers that train as what they will be packed into."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.kernels.int4 import Int4Linear, dequantize_groups, quantize_groups
from optkit.kernels.int8 import Int8Linear, dequantize_rows, quantize_rows
from optkit.transforms.quantize.fake import (
    FakeInt4Linear,
    FakeInt8Embedding,
    FakeInt8Linear,
    fake_groups,
    fake_rows,
    group_range,
    master,
)


def weight_of_kinds(out: int = 12, inputs: int = 128) -> Tensor:
    """Return a weight with outliers, a level group, a group of zeros, one far from zero, and a row of zeros."""
    weight = torch.randn(out, inputs)
    weight[0, 3] = 40.0
    weight[1, :64] = -0.37
    weight[2, :64] = 0.0
    weight[3, :64] = 5 + torch.rand(64) / 100
    weight[4] = 0.0
    weight[5] *= 1e-20
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_fake_weight_in_int4_is_the_packed_layers_weight_bit_for_bit_also_after_training(group_size: int, dtype: torch.dtype) -> None:
    layer = FakeInt4Linear(master(weight_of_kinds()), None, dtype, group_size)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(3):
        packed = layer.pack()
        assert isinstance(packed, Int4Linear)
        assert torch.equal(packed.dequantize(torch.float32), layer.fake_weight())
        assert torch.equal(packed.weight, layer.fake_weight().to(dtype))
        layer(torch.randn(5, 128)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_before_training_the_fake_weight_is_that_of_plain_int4(group_size: int) -> None:
    weight = weight_of_kinds(64)
    plain = dequantize_groups(*quantize_groups(weight, group_size))
    fake = FakeInt4Linear(master(weight), None, torch.float32, group_size).fake_weight()
    assert (fake != plain).float().mean() < 0.001  # where a number stands between two, the last bit of the range may decide
    assert (fake - weight).square().sum() <= (plain - weight).square().sum() * 1.0001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fake_weight_in_int8_is_the_packed_layers_weight_bit_for_bit(dtype: torch.dtype) -> None:
    layer = FakeInt8Linear(master(weight_of_kinds()), None, dtype)
    packed = layer.pack()
    assert isinstance(packed, Int8Linear)
    assert torch.equal(packed.dequantize(torch.float32), layer.fake_weight())
    assert torch.equal(fake_rows(layer.weight), dequantize_rows(*quantize_rows(layer.weight.detach())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_gives_the_rows_of_the_packed_one_bit_for_bit(dtype: torch.dtype) -> None:
    embedding = FakeInt8Embedding(master(weight_of_kinds(20, 48 + 80)), 1, dtype)
    ids = torch.tensor([[0, 3, 19], [4, 5, 1]])
    assert embedding(ids).dtype == dtype
    assert torch.equal(embedding.pack()(ids), embedding(ids))
    assert embedding(ids[:0]).shape == (0, 3, 128)


def test_the_gradient_of_rows_passes_straight_through() -> None:
    weight, grad = weight_of_kinds().requires_grad_(), torch.randn(12, 128)
    fake_rows(weight).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


def straight_through(weight: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    """Return the same as ``fake_groups``, where rounding is written as an addition of what autograd does not see."""
    scale, point = scale[..., None], point[..., None]
    x = weight.unflatten(1, (scale.shape[1], -1)) / scale + point
    rounded = x + (x.round() - x).detach()
    return ((rounded.clamp(0, 15) - point) * scale).flatten(1)


def test_the_gradients_of_groups_are_the_straight_through_estimates() -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(6, 64, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64) / 5 + 0.1, torch.rand(6, 2).double() * 15]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    grad = torch.randn(6, 64, dtype=torch.float64)
    fake, expected = fake_groups(*ours), straight_through(*theirs)
    torch.testing.assert_close(fake, expected)
    numbers = (tensors[0].view(6, 2, 32) / tensors[1][..., None] + tensors[2][..., None]).round()
    assert 0.1 < ((numbers < 0) | (numbers > 15)).double().mean() < 0.9  # some are clipped and some are not
    fake.backward(grad)
    expected.backward(grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_range_follows_the_weight_and_leaves_out_the_clipped_shares() -> None:
    weight = torch.linspace(-1, 3, 64).repeat(2, 1)
    clip = torch.tensor([[[0.25, 0.0]], [[0.0, 0.25]]], requires_grad=True)
    for factor in (1.0, 10.0):
        scale, point = group_range(weight * factor, clip, 64)
        low, high = -point * scale, (15 - point) * scale
        torch.testing.assert_close(low.flatten(), torch.tensor([0.0, -1.0]) * factor, rtol=0.01, atol=0.01)
        torch.testing.assert_close(high.flatten(), torch.tensor([3.0, 2.0]) * factor, rtol=0.01, atol=0.01)
    scale.sum().backward()
    assert clip.grad is not None
    torch.testing.assert_close(clip.grad, torch.full((2, 1, 2), -40 / 15))  # a fifteenth of the width, less


def test_learning_where_to_clip_lowers_the_error_of_a_group_with_an_outlier() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128)
    weight[:, 0] = 12.0
    layer = FakeInt4Linear(master(weight.clone()), None, torch.float32, 128)
    layer.weight.requires_grad_(False)
    wanted = weight.clone()
    wanted[:, 0] = 3.0  # an outlier that does not matter
    optimizer = torch.optim.Adam([layer.clip], lr=0.01)
    errors = []
    for _ in range(150):
        error = (layer.fake_weight()[:, 1:] - wanted[:, 1:]).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_a_layer_of_zeros_can_learn() -> None:
    layer = FakeInt4Linear(master(torch.zeros(8, 64)), None, torch.float32, 64)
    wanted, x = torch.randn(8, 64), torch.randn(256, 64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - x @ wanted.T).square().mean().backward()
        optimizer.step()
    assert (layer.pack().weight - wanted).norm() < 0.2 * wanted.norm()


def test_a_master_is_float32_at_least_and_stays_the_same_parameter_where_it_is() -> None:
    parameter = nn.Parameter(torch.randn(4, 32))
    assert master(parameter) is parameter
    assert master(parameter.detach().bfloat16()).dtype == torch.float32
    with pytest.raises(TransformError, match="meta device has no weight to train; load the model first"):
        master(torch.empty(4, 32, device="meta"))


def test_a_change_of_dtype_reaches_what_the_packed_layer_will_compute_in() -> None:
    layer = FakeInt4Linear(master(torch.randn(4, 64)), nn.Parameter(torch.zeros(4)), torch.float32, 64).to(torch.bfloat16)
    assert layer.pack().weight.dtype == torch.bfloat16
    assert torch.equal(layer.pack().dequantize(torch.float32), layer.fake_weight())


def test_weights_that_are_no_numbers_are_refused_when_they_are_packed() -> None:
    for layer in (
        FakeInt4Linear(master(torch.randn(4, 64)), None, torch.float32, 64),
        FakeInt8Linear(master(torch.randn(4, 64)), None, torch.float32),
    ):
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight[2, 5] = float("nan")
        with pytest.raises(TransformError, match="NaN or infinity in 1 of 4 rows, first in row 2"):
            other.pack()
