"""The layers of bitsandbytes: what is saved stays exact, whatever their kernels do to it while it runs."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import MissingError, TransformError
from optkit.kernels import bnb
from optkit.kernels.bnb import Bits4Linear, BitsandbytesLinear, bitsandbytes
from optkit.kernels.llm_int8 import LlmInt8Linear

pytest.importorskip("bitsandbytes")


def layers(rows: int = 96, columns: int = 128, bias: bool = True) -> dict[str, BitsandbytesLinear]:
    weight = torch.randn(rows, columns)
    offset = torch.randn(rows) if bias else None
    return {
        "nf4": Bits4Linear.from_weight(weight, offset),
        "nf4, plain scales": Bits4Linear.from_weight(weight, offset, double_quant=False),
        "fp4": Bits4Linear.from_weight(weight, offset, format="fp4", block_size=128),
        "llm_int8": LlmInt8Linear.from_weight(weight, offset),
    }


NAMES = list(layers())
EXACT = {"nf4": 0.12, "nf4, plain scales": 0.12, "fp4": 0.16, "llm_int8": 0.012}  # the relative error of the weights at most


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_is_near_and_the_forward_is_that_of_the_weight(name: str) -> None:
    torch.manual_seed(3)
    weight = torch.randn(96, 128)
    torch.manual_seed(3)
    layer = layers()[name]
    assert ((layer.weight - weight).norm() / weight.norm()) < EXACT[name]
    x = torch.randn(5, 128)
    with torch.inference_mode():
        found, expected = layer(x), functional.linear(x, layer.weight, layer.bias)
    assert (found - expected).norm() / expected.norm() < 0.02  # their kernels round activations to bfloat16, or to int8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_changes_nothing_that_is_saved(name: str, bias: bool) -> None:
    layer = layers(bias=bias)[name]
    before, x = state(layer), torch.randn(3, 128)
    with torch.inference_mode():
        first = layer(x)
        after = state(layer)
        again = type(layer).empty(**layer.layout())
        again.load_state_dict(after)
        assert torch.equal(again(x), first)
        assert torch.equal(layer(x), first)
        assert torch.equal(copy.deepcopy(layer)(x), first)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_mode_does_not_matter_and_a_gradient_reaches_the_input_alone(name: str) -> None:
    layer = layers()[name]
    x = torch.randn(4, 128)
    with torch.inference_mode():
        assert torch.equal(layer.train()(x), layer.eval()(x))
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), atol=1e-3)
    assert all(not parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_dtype_is_for_bias_and_results_alone(name: str) -> None:
    layer = layers()[name]
    before = state(layer)
    layer.to(torch.bfloat16)
    after = state(layer)
    assert all(torch.equal(before[key], after[key]) for key in before if key != "bias")
    assert after["bias"].dtype == layer.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_counted_from_what_is_stored(name: str) -> None:
    layer = layers()[name]
    idle = {"weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "weight_format"}
    stored = sum(tensor.nbytes for key, tensor in layer.state_dict().items() if key not in idle)
    assert layer.weight_bytes == stored
    with torch.inference_mode():
        layer(torch.randn(1, 128))
    assert layer.weight_bytes == stored


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_lacks_something_names_it_as_bitsandbytes_does(name: str) -> None:
    layer = layers()[name]
    lacking = state(layer)
    del lacking["weight"]
    assert layer.load_state_dict(lacking, strict=False).missing_keys == ["weight"]


def test_what_has_no_number_is_refused() -> None:
    spoiled = torch.randn(32, 64)
    spoiled[3, 5] = torch.nan
    for kind in (Bits4Linear, LlmInt8Linear):
        with pytest.raises(TransformError, match="NaN or infinity in 1 of 32 rows, first in row 3"):
            kind.from_weight(spoiled)
    with pytest.raises(TransformError, match="NaN or infinity"):
        LlmInt8Linear.from_weight(torch.full((32, 64), 1e5))  # beyond float16


def test_sizes_that_their_kernels_cannot_take_are_refused_with_the_way_out() -> None:
    with pytest.raises(TransformError, match="block_size 128 does not divide in_features 64; use block_size 64"):
        Bits4Linear.from_weight(torch.randn(32, 64), block_size=128)
    with pytest.raises(TransformError, match="does not divide in_features 100; exclude this layer"):
        Bits4Linear.from_weight(torch.randn(32, 100))
    with pytest.raises(TransformError, match="out_features 33 is no multiple of 32"):
        Bits4Linear.from_weight(torch.randn(33, 64))


def test_without_the_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingError, match=r"pip install 'bitsandbytes>=0\.48'"):
        bitsandbytes()


def test_the_import_fetches_no_kernel_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setitem(sys.modules, "kernels", sys)
    monkeypatch.setattr(bnb.importlib, "import_module", lambda name: seen.append(sys.modules["kernels"]))
    bitsandbytes()
    assert seen == [None]
    assert sys.modules["kernels"] is sys
    assert logging.getLogger("bitsandbytes").level == logging.NOTSET


def test_outlier_columns_are_computed_in_float() -> None:
    weight, x = torch.randn(32, 64), torch.randn(4, 64)
    x[:, 7] = 60.0
    exact = functional.linear(x, weight)
    with torch.inference_mode():
        errors = [(LlmInt8Linear.from_weight(weight, threshold=threshold)(x) - exact).norm() for threshold in (6.0, 0.0)]
    assert errors[0] < errors[1] / 3


def test_it_says_nothing_while_it_runs(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    layer = LlmInt8Linear.from_weight(torch.randn(32, 64))
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
