"""Both linear layers on every backend, against float64, and through saving, copying, moving and tracing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from optkit.kernels import LAYERS
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.packed import PackedLinear, prepare_layers

ROWS = (1, 2, 3, 7, 16, 33, 128)
SIZES = {
    "int8_linear": [(1, 1), (5, 3), (33, 17), (64, 48), (130, 100)],
    "int4_linear": [(32, 1), (64, 17), (96, 48), (160, 33), (256, 100)],
}
FEW = {"int8_linear": 2e-6, "int4_linear": 1e-5}  # tolerance; int4 rounds x to 16 bits
HALF = 4e-3  # where x is bfloat16, or rounded to it
MANY = 6  # from so many rows on, x may be rounded to bfloat16


def make(kind: str, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return Int8Linear.from_linear(linear) if kind == "int8_linear" else Int4Linear.from_linear(linear, group_size=32)


def error_of(layer: PackedLinear, x: Tensor, y: Tensor) -> float:
    """Return the largest error against float64, as a share of the largest result that the norms allow."""
    weight = layer.dequantize(torch.float64)
    exact = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    allowed = x.double().norm(dim=-1).max() * weight.norm(dim=1).max() + exact.abs().max()
    return float((y.double() - exact).abs().max() / allowed)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_agree_with_float64(backend: str, kind: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for in_features, out_features in SIZES[kind]:
        for bias in (False, True):
            layer = make(kind, in_features, out_features, bias, dtype)
            for rows in ROWS:
                x = torch.randn(rows, in_features, dtype=dtype)
                y = layer(x)
                assert y.dtype == dtype and y.shape == (rows, out_features)
                limit = HALF if rows >= MANY or dtype == torch.bfloat16 else FEW[kind]
                assert error_of(layer, x, y) < limit, (in_features, out_features, rows)


@pytest.mark.parametrize("kind", SIZES)
def test_a_large_product_agrees_with_float64(backend: str, kind: str) -> None:
    torch.set_num_threads(2)
    layer = make(kind, 1088, 1000)
    for rows in (1, 4, 5, 6, 300):
        x = torch.randn(rows, 1088)
        assert error_of(layer, x, layer(x)) < (HALF if rows >= MANY else FEW[kind])


@pytest.mark.parametrize("kind", SIZES)
def test_more_threads_than_blocks_of_rows_share_the_input(backend: str, kind: str) -> None:
    torch.set_num_threads(5)
    layer = make(kind, 1024, 40)
    x = torch.randn(300, 1024)
    assert error_of(layer, x, layer(x)) < HALF


@pytest.mark.parametrize("kind", SIZES)
def test_inputs_of_any_form_are_taken(backend: str, kind: str) -> None:
    layer = make(kind, 64, 24)
    x = torch.randn(2, 3, 64)
    flat = layer(x.reshape(6, 64))
    torch.testing.assert_close(layer(x), flat.view(2, 3, 24))
    torch.testing.assert_close(layer(x[0, 0]), layer(x[:1, 0])[0])
    strided = torch.randn(64, 4).T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=0, atol=0)
    assert layer(x[:0]).shape == (0, 3, 24)
    with pytest.raises(RuntimeError, match=r"features|shapes"):
        layer(torch.randn(2, 32))


@pytest.mark.parametrize("kind", SIZES)
def test_other_dtypes_run_in_pytorch(backend: str, kind: str) -> None:
    layer = make(kind, 64, 24)
    for dtype, limit in ((torch.float64, 1e-6), (torch.float16, 1e-3)):
        x = torch.randn(4, 64, dtype=dtype)
        assert layer(x).dtype == dtype
        assert error_of(layer, x, layer(x)) < limit


@pytest.mark.parametrize("kind", SIZES)
def test_a_bias_of_another_dtype_is_added(backend: str, kind: str) -> None:
    layer = make(kind, 64, 24)
    x = torch.randn(3, 64)
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float64):
        layer.bias.data = layer.bias.data.to(dtype)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", SIZES)
def test_a_gradient_reaches_the_input(backend: str, kind: str) -> None:
    layer = make(kind, 64, 24)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 64))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.detach()))


@pytest.mark.parametrize("kind", SIZES)
def test_nan_and_infinity_of_the_input_are_not_hidden(backend: str, kind: str) -> None:
    layer = make(kind, 64, 24, bias=False)
    for rows in (1, 16):
        x = torch.zeros(rows, 64)
        x[0, 5] = torch.nan
        y = layer(x)
        assert y[0].isnan().all() and (y[1:] == 0).all()


@pytest.mark.parametrize("kind", SIZES)
def test_the_state_is_the_same_before_and_after_the_first_forward(backend: str, kind: str) -> None:
    layer = make(kind, 64, 33)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(1, 64))
    after = layer.state_dict()
    assert set(after) == set(before) == {*layer.portable, "bias"}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
        assert after[name].is_contiguous()


@pytest.mark.parametrize("kind", SIZES)
def test_a_state_saved_by_one_backend_runs_on_another(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from optkit.kernels import native

    layer = make(kind, 96, 33)
    x = torch.randn(2, 96)
    expected = layer(x)
    other = LAYERS[kind].empty(**layer.layout())  # type: ignore[attr-defined]
    other(x)  # in the layout of the kernels before the state comes
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected)
    monkeypatch.setenv("OPTKIT_KERNELS", "torch")
    native.forget()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-4)  # int4 kernels round x to 16 bits


@pytest.mark.parametrize("kind", SIZES)
def test_a_state_of_wrong_dtype_or_shape_is_refused(kind: str) -> None:
    layer = make(kind, 64, 32)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="expected torch"):
        layer.load_state_dict({**state, "qweight": state["qweight"].float()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**state, "scale": state["scale"][:3]})


@pytest.mark.parametrize("kind", SIZES)
def test_only_one_layout_is_in_memory(native_only: None, kind: str) -> None:
    layer = make(kind, 256, 256, bias=False)
    before = sum(buffer.nbytes for buffer in layer.buffers())
    layer(torch.randn(1, 256))
    assert layer.kernel is not None
    assert sum(buffer.nbytes for buffer in layer.buffers()) == before == layer.weight_bytes


@pytest.mark.parametrize("kind", SIZES)
def test_copies_and_pickles_run_alone(backend: str, kind: str) -> None:
    layer = make(kind, 64, 33)
    x = torch.randn(2, 64)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = (copy.deepcopy(layer), torch.load(file, weights_only=False))
    with torch.no_grad():
        layer.bias.add_(1)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(layer(x), expected + 1)


@pytest.mark.parametrize("kind", SIZES)
def test_a_change_of_dtype_leaves_the_packed_weight_alone(backend: str, kind: str) -> None:
    layer = make(kind, 64, 33)
    layer(torch.randn(1, 64))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16).float().half().to(torch.bfloat16)
    after = layer.state_dict()
    for name in layer.portable:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert layer.bias.dtype == layer.weight.dtype == layer.compute_dtype == torch.bfloat16
    assert layer(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", SIZES)
def test_meta_layers_have_the_right_shapes(kind: str) -> None:
    with torch.device("meta"):
        layer = make(kind, 64, 33)
        y = layer(torch.randn(2, 5, 64))
    assert y.is_meta and y.shape == (2, 5, 33)
    assert layer.weight.shape == (33, 64)
    real = make(kind, 64, 33)
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), real(x))


@pytest.mark.parametrize("kind", SIZES)
def test_a_packed_layer_is_a_linear_layer_to_others(kind: str) -> None:
    layer = make(kind, 64, 33)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (64, 33, (33, 64))
    assert "out_features=33" in repr(layer)
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(33, 64))  # type: ignore[misc]


@pytest.mark.parametrize("kind", SIZES)
def test_a_compiled_model_equals_the_eager_one(backend: str, kind: str) -> None:
    torch.compiler.reset()
    model = nn.Sequential(make(kind, 64, 32), nn.ReLU(), make(kind, 32, 8, bias=False))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        assert prepare_layers(model) == (0 if backend == "torch" else 2)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_every_registered_layer_can_be_made_empty_from_its_layout() -> None:
    layers = {
        "int8_linear": Int8Linear.from_weight(torch.randn(8, 32)),
        "int8_embedding": Int8Embedding.from_embedding(nn.Embedding(10, 6, padding_idx=2)),
        "int4_linear": Int4Linear.from_weight(torch.randn(8, 128), torch.zeros(8), group_size=128),
    }
    assert set(LAYERS) >= set(layers)
    for name, layer in layers.items():
        empty = LAYERS[name].empty(**layer.layout())  # type: ignore[attr-defined]
        empty.load_state_dict(layer.state_dict())
        assert empty.layout() == layer.layout()
        torch.testing.assert_close(empty.weight, layer.weight, rtol=0, atol=0)
