"""Weights without their zeros: bits and values hold them exactly, and the kernel multiplies as float64 does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.kernels import native
from optkit.kernels.packed import prepare_layers
from optkit.kernels.sparse import SparseLinear, compress, expand, explain_sparse

SHAPES = [(1, 1), (3, 16), (5, 17), (16, 31), (33, 64), (7, 257), (130, 96), (64, 1000)]


def weight_of(rows: int, cols: int, zeros: float, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols).masked_fill(torch.rand(rows, cols) < zeros, 0).to(kind)


@pytest.fixture(params=["auto", "avx2", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPTKIT_KERNELS", request.param)
    native.forget()
    yield request.param
    monkeypatch.undo()
    native.forget()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97, 1.0])
def test_what_is_compressed_comes_back_bit_by_bit(rows: int, cols: int, zeros: float) -> None:
    weight = weight_of(rows, cols, zeros, torch.bfloat16)
    bits, values = compress(weight)
    assert bits.shape == (rows, -(-cols // 16), 2)
    assert len(values) == int((weight != 0).sum())
    assert torch.equal(expand(bits, values, cols), weight)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 40])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64(backend: str, kind: torch.dtype, m: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for rows, cols in SHAPES:
        weight, bias, x = weight_of(rows, cols, 0.6, kind), torch.randn(rows).to(kind), torch.randn(m, cols)
        layer = SparseLinear.from_weight(weight, bias)
        exact = x.double() @ weight.double().T + bias.double()
        assert (layer(x).double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())
        half = layer(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert (half.double() - exact).abs().max() <= 0.05 * (1 + exact.abs().max())


def test_without_the_kernel_it_is_told_that_the_speed_is_simulated(backend: str) -> None:
    native.forget()
    kernel = native.backend() in native.LADDER[1:]
    assert ("simulated" in explain_sparse()) is not kernel
    assert backend == "auto" or not kernel


def test_inputs_that_are_not_in_a_row_are_read_right() -> None:
    weight = weight_of(20, 48, 0.5)
    x = torch.randn(48, 3).T
    torch.testing.assert_close(SparseLinear.from_weight(weight)(x), x @ weight.T)
    assert SparseLinear.from_weight(weight)(torch.randn(2, 0, 48)).shape == (2, 0, 20)
    with pytest.raises(RuntimeError):
        SparseLinear.from_weight(weight)(torch.randn(2, 47))


def test_it_gives_a_gradient_to_its_input() -> None:
    weight = weight_of(20, 48, 0.5)
    x = torch.randn(3, 48, requires_grad=True)
    SparseLinear.from_weight(weight)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 48))


def test_it_is_a_linear_layer_to_others_and_tells_its_bytes() -> None:
    weight = weight_of(64, 128, 0.5)
    layer = SparseLinear.from_weight(weight, torch.zeros(64))
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, weight)
    assert layer.weight_bytes == 64 * 128 // 8 + 4 * int((weight != 0).sum()) + 4 * 64


def test_after_it_has_run_it_is_copied_saved_and_opened_again(tmp_path: Path) -> None:
    layer, x = SparseLinear.from_weight(weight_of(40, 70, 0.5)), torch.randn(1, 70)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    optkit.save(layer, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved", into=nn.Linear(70, 40, bias=False)).module
    assert torch.equal(again(x), before)
    assert torch.equal(layer.to(torch.float64)(x.double()).float(), (x.double() @ layer.weight.double().T).float())


@pytest.mark.parametrize("m", [1, 30])
def test_compiled_it_is_one_graph_with_the_same_answers(m: int) -> None:
    module = nn.Sequential(SparseLinear.from_weight(weight_of(32, 64, 0.5), torch.randn(32)), nn.ReLU()).eval()
    x = torch.randn(m, 64)
    expected = module(x)
    prepare_layers(module)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), expected)
    torch.compiler.reset()


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(TransformError):
        SparseLinear.from_weight(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_many_rows_go_strip_by_strip(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optkit.kernels.sparse._STRIP", 20 * 48)
    weight, bias, x = weight_of(70, 48, 0.6, kind), torch.randn(70).to(kind), torch.randn(3, 11, 48)
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(SparseLinear.from_weight(weight, bias)(x).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_cuda_a_pattern_of_two_in_four_runs_on_the_units_for_it() -> None:
    weight = torch.randn(128, 256).bfloat16().unflatten(1, (-1, 4))
    weight[..., :2] = 0
    layer = SparseLinear.from_weight(weight.flatten(1)).cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ weight.flatten(1).cuda().double().T
    assert (layer(x).double() - exact).norm() < 0.01 * exact.norm()
    assert type(layer._dense) is not Tensor
