"""Packed LSTMs and GRUs against PyTorch's own in float64: layers, directions, layouts of the batch, sequences of unequal length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from optkit.core.errors import TransformError
from optkit.kernels import LAYERS
from optkit.kernels.gru import Int8GRU
from optkit.kernels.lstm import Int8LSTM
from optkit.kernels.recurrent import PackedRecurrent, places

KINDS: dict[str, tuple[type[nn.RNNBase], type[PackedRecurrent]]] = {"int8_lstm": (nn.LSTM, Int8LSTM), "int8_gru": (nn.GRU, Int8GRU)}
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
]


def pair(kind: str, dtype: torch.dtype = torch.float64, **form: Any) -> tuple[nn.RNNBase, PackedRecurrent]:
    """Return a packed layer, and a plain one in float64 with the very weights that the packed one stands for."""
    plain, packed = KINDS[kind]
    exact: Any = plain(13, 21, **form, dtype=torch.float64)  # type: ignore[call-overload,arg-type]
    layer = packed.from_plain(copy.deepcopy(exact).to(dtype))
    with torch.no_grad():
        for place in places(exact.num_layers, exact.bidirectional):
            for name, part in ((f"weight_ih_{place}", "input"), (f"weight_hh_{place}", "hidden")):
                getattr(exact, name).copy_(layer.get_submodule(f"{part}_{place}").dequantize(torch.float64))  # type: ignore[operator]
    return exact, layer


def flat(found: Any) -> list[Tensor]:
    """Return outputs and states as a list of tensors."""
    output, states = found
    return [output.data if isinstance(output, PackedSequence) else output, *(states if isinstance(states, tuple) else (states,))]


def states(layer: nn.RNNBase, batch: tuple[int, ...]) -> Any:
    shape = (layer.num_layers * (1 + layer.bidirectional), *batch, layer.hidden_size)
    begun = tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))
    return begun if isinstance(layer, nn.LSTM) else begun[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_pytorch_in_float64(backend: str, kind: str, form: dict[str, Any]) -> None:
    exact, layer = pair(kind, **form)
    x = torch.randn(5, 4, 13, dtype=torch.float64)
    begun = states(exact, (5 if exact.batch_first else 4,))
    for given in ((x,), (x, begun)):
        for found, expected in zip(flat(layer(*given)), flat(exact(*given)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    alone = torch.randn(6, 13, dtype=torch.float64)
    for given in ((alone,), (alone, states(exact, ()))):
        for found, expected in zip(flat(layer(*given)), flat(exact(*given)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "as-they-come"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_unequal_length_are_those_of_pytorch(kind: str, form: dict[str, Any], sort: bool) -> None:
    exact, layer = pair(kind, **form)
    lengths = [7, 4, 4, 1] if sort else [4, 7, 1, 4]
    x = torch.randn(*((4, 7) if exact.batch_first else (7, 4)), 13, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), exact.batch_first, enforce_sorted=sort)
    for given in ((packed,), (packed, states(exact, (4,)))):
        for found, expected in zip(flat(layer(*given)), flat(exact(*given)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    padded = [pad_packed_sequence(one(packed)[0], exact.batch_first)[0] for one in (layer, exact)]
    torch.testing.assert_close(*padded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_give_the_same_within_their_rounding(backend: str, kind: str, dtype: torch.dtype, rows: int) -> None:
    exact, layer = pair(kind, dtype, num_layers=2, bidirectional=True)
    x = torch.randn(9, rows, 13).to(dtype)
    with torch.no_grad():
        for found, expected in zip(flat(layer(x)), flat(exact(x.double())), strict=True):
            assert found.dtype == dtype
            limit = 1e-5 if dtype is torch.float32 and backend == "torch" else 2e-2  # many rows at once may be rounded to bfloat16
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_from_its_layout_and_state_and_from_copies(backend: str, kind: str) -> None:
    plain, packed = KINDS[kind]
    layer = packed.from_plain(plain(13, 21, num_layers=2, bidirectional=True, batch_first=True, dropout=0.25).eval())  # type: ignore[call-overload,arg-type]
    x = torch.randn(3, 5, 13)
    with torch.no_grad():
        expected = layer(x)[0]
        again = LAYERS[kind].empty(**layer.layout()).eval()  # type: ignore[attr-defined]
        again.load_state_dict(layer.state_dict())
        for twin in (again, copy.deepcopy(layer)):
            assert twin.layout() == layer.layout()
            assert torch.equal(twin(x)[0], expected)
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half(x.bfloat16())[0].dtype == torch.bfloat16
        assert half.layout()["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_layer_to_others(kind: str) -> None:
    exact, layer = pair(kind, num_layers=2, bidirectional=True)
    assert isinstance(layer, KINDS[kind][0])
    assert (layer.mode, layer.input_size, layer.hidden_size, layer.proj_size) == (exact.mode, 13, 21, 0)
    assert layer.extra_repr() == exact.extra_repr()
    assert not list(layer.parameters(recurse=False))
    layer.flatten_parameters()
    for mine, theirs in zip(layer.all_weights, exact.all_weights, strict=True):
        for found, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found.detach(), expected.detach())
    torch.testing.assert_close(layer.weight_hh_l1_reverse.detach(), exact.weight_hh_l1_reverse.detach())  # type: ignore[union-attr,operator]
    with pytest.raises(AttributeError, match="no attribute 'weight_hr'"):
        _ = layer.weight_hr


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_is_for_training_alone(kind: str) -> None:
    plain, packed = KINDS[kind]
    layer = packed.from_plain(plain(13, 21, num_layers=2, dropout=0.9))  # type: ignore[call-overload,arg-type]
    x = torch.randn(4, 2, 13)
    assert layer.training
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_the_input(kind: str) -> None:
    exact, layer = pair(kind, bidirectional=True)
    x = torch.randn(4, 2, 13, dtype=torch.float64)
    gradients = []
    for one in (layer, exact):
        given = x.clone().requires_grad_()
        one(given)[0].square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_dequantized_once_a_call_where_no_kernel_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = pair(kind, num_layers=2)
    calls: list[object] = []
    dequantize = type(layer.input_l0).dequantize  # type: ignore[union-attr]
    monkeypatch.setattr(type(layer.input_l0), "dequantize", lambda self, dtype: calls.append(self) or dequantize(self, dtype))  # type: ignore[func-returns-value,operator,arg-type]
    layer(torch.randn(9, 2, 13, dtype=torch.float64))
    assert len(calls) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_meta_layers_have_the_right_shapes(kind: str) -> None:
    plain, packed = KINDS[kind]
    with torch.device("meta"):
        layer = packed.from_plain(plain(13, 21, bidirectional=True))  # type: ignore[call-overload,arg-type]
        output = layer(torch.randn(5, 4, 13))[0]
    assert output.is_meta
    assert output.shape == (5, 4, 42)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    _, layer = pair(kind)
    x = torch.randn(5, 4, 13, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Expected 13, got 12"):
        layer(x[..., :12])
    with pytest.raises(RuntimeError, match="no time step"):
        layer(x[:0])
    with pytest.raises(ValueError, match="2D or 3D, got 4D"):
        layer(x[None])
    with pytest.raises(RuntimeError, match=r"states of size \(1, 4, 21\)"):
        layer(x, states(layer, (3,)))
    with pytest.raises(RuntimeError, match=r"states of size \(1, 4, 21\)"):
        layer(x, (torch.zeros(1, 4, 21),) if kind == "int8_lstm" else (torch.zeros(1, 4, 21),) * 2)


def test_projections_and_forwards_of_ones_own_are_refused() -> None:
    class Own(nn.GRU):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
            return super().forward(input, hx)

    with pytest.raises(TransformError, match=r"a LSTM with a projection \(proj_size 8\)"):
        Int8LSTM.from_plain(nn.LSTM(13, 21, proj_size=8))
    with pytest.raises(TransformError, match="Own is a GRU with a forward of its own"):
        Int8GRU.from_plain(Own(13, 21))
    broken = nn.LSTM(13, 21)
    broken.weight_hh_l0.data[3, 2] = torch.nan
    with pytest.raises(TransformError, match="first in row 3"):
        Int8LSTM.from_plain(broken)
