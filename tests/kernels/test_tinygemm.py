from __future__ import annotations

import pytest
import torch

from optkit.kernels.int4 import Int4Linear, int4_linear_reference, quantize_groups
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.layout import unpack_nibbles
from optkit.kernels.tinygemm import fits, scale_and_zero

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_sizes_that_tinygemm_does_not_take_are_known() -> None:
    assert fits(8, 128, 32) and fits(5632, 2048, 128)
    assert not fits(9, 128, 32) and not fits(8, 96, 32) and not fits(8, 384, 96)


def test_its_scales_and_zeros_mean_the_same_weight() -> None:
    """The operator for the CPU computes by the same law from another layout of the numbers, and can be run anywhere."""
    q, scale, point = quantize_groups(torch.randn(64, 256), 64)
    x = torch.randn(3, 256).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_nibbles(q).int(), 8)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scale_and_zero(scale, point))
    torch.testing.assert_close(y.float(), int4_linear_reference(x.float(), q, scale, point), rtol=0.02, atol=0.3)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_layer_on_cuda_agrees_with_the_reference_and_comes_back_unchanged(group: int) -> None:
    layer = Int4Linear.from_weight(torch.randn(264, 512), torch.randn(264), group)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 5, 512)
    expected = layer(x)
    layer.to("cuda")
    y = layer(x.cuda().bfloat16())
    assert layer.tiles is not None
    torch.testing.assert_close(y.float().cpu(), expected, rtol=0.05, atol=1.0)
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=0, atol=0.05)
    layer.to("cpu")
    assert layer.tiles is None
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("without_kernels")
def test_int8_on_cuda_agrees_with_the_reference() -> None:
    layer = Int8Linear.from_weight(torch.randn(100, 192))
    x = torch.randn(7, 192)
    expected = layer(x)
    torch.testing.assert_close(layer.to("cuda")(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
