"""Quantized keys and values keep their law against float64, at every width, group, shape and type."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.kernels.kv import Packed, dequantize, quantize

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 48), (1, 2, 7, 64), (3, 1, 0, 16)]


def reference(packed: Packed, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return number * scale + low in float64, number by number, group by group."""
    out = torch.empty(shape, dtype=torch.float64)
    size = shape[-1] // packed.scale.shape[-1]
    for *place, channel in itertools.product(*(range(n) for n in shape)):
        where, group = tuple(place), channel // size
        byte = int(packed.numbers[(*where, channel if bits == 8 else channel // 2)])
        number = byte if bits == 8 else (byte >> 4 if channel % 2 else byte & 15)
        out[(*where, channel)] = number * packed.scale[(*where, group)].double() + packed.low[(*where, group)].double()
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_back_is_number_times_scale_plus_low_within_half_a_step(
    bits: int, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) * torch.tensor([0.01, 1, 30])[torch.randint(3, shape)] + 2 * torch.randn(shape[:-1])[..., None]).to(dtype)
    packed = quantize(x, bits, shape[-1] // groups)
    assert packed.numbers.dtype is torch.uint8
    assert packed.numbers.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert packed.scale.shape == packed.low.shape == (*shape[:-1], groups)
    expected = reference(packed, bits, shape)
    torch.testing.assert_close(dequantize(packed, bits).double(), expected, rtol=1e-6, atol=1e-6)
    half = packed.scale.double().repeat_interleave(shape[-1] // groups, -1) / 2
    assert ((expected - x.double()).abs() <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_step_is_hardly_wider_than_the_range_asks_for(bits: int) -> None:
    x = torch.randn(4, 2, 9, 64)
    packed = quantize(x, bits)
    ideal = (x.amax(-1) - x.amin(-1)).double() / (2**bits - 1)
    ratio = packed.scale[..., 0].double() / ideal
    assert (ratio >= 1).all()
    assert (ratio < 1.015).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-20, -1e20])
def test_equal_channels_come_back_close_and_zeros_exactly(bits: int, value: float) -> None:
    x = torch.full((1, 1, 2, 16), value)
    found = dequantize(quantize(x, bits), bits)
    assert torch.isfinite(found).all()
    assert ((found - x).abs() <= 0.01 * abs(value)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_own_group_visibly(bits: int, value: float) -> None:
    x = torch.randn(1, 1, 2, 32)
    x[0, 0, 0, 3] = value
    found = dequantize(quantize(x, bits, 16), bits)
    assert not torch.isfinite(found[0, 0, 0, :16]).any()
    assert torch.isfinite(found[0, 0, 0, 16:]).all()
    assert torch.isfinite(found[0, 0, 1]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_position_never_looks_at_another(bits: int) -> None:
    x = torch.randn(2, 3, 11, 32)
    whole = quantize(x, bits, 16)
    parts = quantize(x[:, :, :4], bits, 16).followed_by(quantize(x[:, :, 4:], bits, 16))
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert parts.positions == 11
    late = whole.without_first(9)
    assert torch.equal(dequantize(late, bits), dequantize(whole, bits)[:, :, 9:])
    assert late.numbers.untyped_storage().nbytes() == late.numbers.numel()


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    x = torch.randn(1, 4, 50, 64)
    errors = {(bits, size): float((dequantize(quantize(x, bits, size), bits) - x).norm()) for bits in (8, 4) for size in (64, 16)}
    assert errors[8, 16] < errors[8, 64] < errors[4, 16] / 8 < errors[4, 64] / 8


@pytest.mark.parametrize(
    ("channels", "bits", "group_size", "why"),
    [
        (15, 4, None, "does not fill whole bytes.*bits: 8"),
        (48, 8, 32, "32 does not divide the 48 channels.*use 16"),
        (6, 4, 4, "use 6, or"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_way_out(channels: int, bits: int, group_size: int | None, why: str) -> None:
    with pytest.raises(TransformError, match=why):
        quantize(torch.randn(1, 1, 1, channels), bits, group_size)
