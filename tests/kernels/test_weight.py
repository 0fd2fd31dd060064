"""The weight of a packed layer: a tensor to everybody, without values until they are asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.kernels.int8 import Int8Linear
from optkit.kernels.weight import PackedWeight


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Int8Linear, list[object]]:
    """A packed layer, and a list that grows at each dequantization."""
    calls: list[object] = []
    dequantize = Int8Linear.dequantize

    def count(self: Int8Linear, dtype: torch.dtype) -> Tensor:
        calls.append(self)
        return dequantize(self, dtype)

    monkeypatch.setattr(Int8Linear, "dequantize", count)
    return Int8Linear.from_weight(torch.randn(8, 6, dtype=torch.bfloat16)), calls


def test_sizes_dtype_and_device_cost_no_values(counted: Any) -> None:
    layer, calls = counted
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((8, 6), torch.bfloat16, "cpu", 2)
    assert (len(weight), weight.size(1), weight.dim(), weight.numel(), weight.is_floating_point()) == (8, 6, 2, 48, True)
    assert not (weight.requires_grad or weight.is_meta or weight.is_cuda)
    assert calls == []


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: weight.T,
        lambda weight: weight.data,
        lambda weight: weight.detach(),
        lambda weight: weight[2],
        lambda weight: torch.stack([weight, weight]),
        lambda weight: nn.functional.linear(torch.ones(2, 6, dtype=weight.dtype), weight),
        copy.deepcopy,
    ],
)
def test_whatever_is_computed_from_it_is_a_plain_tensor_of_the_right_values(counted: Any, use: Any) -> None:
    layer, _ = counted
    found = use(layer.weight)
    assert type(found) is Tensor
    assert torch.equal(found, use(layer.dequantize(torch.bfloat16)))


def test_values_leave_it_by_every_door(counted: Any) -> None:
    layer, _ = counted
    dense = layer.dequantize(torch.float32)
    layer.float()
    assert layer.weight.tolist() == dense.tolist()
    assert (layer.weight.numpy() == dense.numpy()).all()
    assert repr(layer.weight) == repr(dense)
    assert torch.equal(torch.ops.aten.mul.Tensor(layer.weight, 2), dense * 2)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.add(layer.weight, 1), dense + 1)


def test_it_follows_the_layer_to_the_meta_device() -> None:
    with torch.device("meta"):
        layer = Int8Linear.from_weight(torch.randn(8, 6))
    assert layer.weight.is_meta
    assert (layer.weight + 1).shape == (8, 6)


def test_functions_of_pytorch_see_that_it_is_no_plain_tensor() -> None:
    weight = Int8Linear.from_weight(torch.randn(8, 6)).weight
    assert type(weight) is PackedWeight
    assert torch.overrides.has_torch_function((weight,))
