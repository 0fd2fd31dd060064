"""Linear layers of whole numbers on both sides, against exact sums."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.kernels import LAYERS, w8a8
from optkit.kernels.int8 import quantize_rows
from optkit.kernels.layout import quads_from_kernel, quads_to_kernel, with_totals
from optkit.kernels.packed import PackedLinear, prepare_layers
from optkit.kernels.w8a8 import MOST_COLUMNS, W8A8Linear, integer_product, quantize_tokens, w8a8_linear_reference

SIZES = [(1, 1), (5, 3), (33, 17), (64, 48), (130, 100)]
STATIC = pytest.mark.parametrize("scale", [None, 0.02], ids=["dynamic", "static"])


def make(
    in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.float32, scale: float | None = None
) -> W8A8Linear:
    return W8A8Linear.from_linear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype), scale)


def by_hand(layer: W8A8Linear, x: Tensor) -> Tensor:
    """Return the results in float64, by sums of whole numbers, one token after another."""
    q, scale, *static = (tensor.double() for tensor in layer.tensors())
    rows = []
    for token in x.double():
        step = static[0] if static else token.float().abs().max() / 127
        whole = torch.zeros_like(token) if step == 0 else torch.round(token.float() / step.float()).clamp(-127, 127).double()
        rows.append((q @ whole) * step.double() * scale + (0 if layer.bias is None else layer.bias.double()))
    return torch.stack(rows)


@STATIC
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_results_are_exact_sums_rounded_once(backend: str, dtype: torch.dtype, limit: float, scale: float | None) -> None:
    for in_features, out_features in SIZES:
        for bias in (False, True):
            layer = make(in_features, out_features, bias, dtype, scale)
            for rows in (1, 2, 7, 33):
                x = torch.randn(rows, in_features, dtype=dtype)
                y, exact = layer(x), by_hand(layer, x)
                assert y.dtype == dtype and y.shape == exact.shape
                assert (y.double() - exact).abs().max() <= limit * (exact.abs().max() + 1)


@STATIC
def test_the_reference_and_the_layer_agree(backend: str, scale: float | None) -> None:
    layer = make(50, 40, scale=scale)
    q, row_scale, *static = layer.tensors()
    x = torch.randn(2, 3, 50)
    expected = w8a8_linear_reference(x, q, row_scale, static[0] if static else None, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_no_activation_is_off_by_more_than_half_a_scale() -> None:
    x = torch.randn(40, 70) * torch.logspace(-6, 6, 40)[:, None]
    q, scale = quantize_tokens(x)
    assert q.dtype == torch.int8 and scale.shape == (40, 1)
    assert ((q.double() * scale.double() - x.double()).abs() <= 0.5001 * scale.double()).all()
    assert (q.abs().amax(dim=1) == 127).all()


def test_values_beyond_a_static_scale_saturate() -> None:
    q, scale = quantize_tokens(torch.tensor([[0.0, 0.3, -0.5, 1.0, 1.5, 1e6, -1e6]]), torch.tensor([0.5]))
    assert q.tolist() == [[0, 1, -1, 2, 3, 127, -127]]
    assert scale.tolist() == [[0.5]]
    halves, _ = quantize_tokens(torch.tensor([[0.25, 0.75, 1.25]]), torch.tensor([0.5]))
    assert halves.tolist() == [[0, 2, 2]]  # halves to even, as the processors round


@STATIC
def test_zeros_give_the_bias_and_the_least_numbers_no_nonsense(backend: str, scale: float | None) -> None:
    layer = make(64, 24, scale=scale)
    torch.testing.assert_close(layer(torch.zeros(3, 64)), layer.bias.expand(3, 24), rtol=0, atol=0)
    assert (layer(torch.full((1, 64), 1e-45)) - layer.bias).abs().max() < 1e-30
    bare = make(64, 24, bias=False, scale=scale)
    assert (bare(torch.zeros(3, 64)) == 0).all()


@STATIC
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_of_the_input_are_not_hidden(backend: str, bad: float, scale: float | None) -> None:
    layer = make(64, 24, bias=False, scale=scale)
    x = torch.zeros(16, 64)
    x[0, 5] = bad
    y = layer(x)
    assert y[0].isnan().all() and (y[1:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (1, 384, 64), (17, 130, 33), (5, 3000, 31), (40, 640, 64)])
def test_integer_products_are_exact_on_every_path(shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    tokens, q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
    tokens[0], q[0] = 127, -127  # where processors without wide sums would saturate
    exact = tokens.long() @ q.long().T
    padded = [w8a8._padded_product] if w8a8.int_mm_is_exact() else []  # the path of CUDA, on whatever is here
    for product in (integer_product, w8a8._float_product, *padded):
        found = product(tokens, q)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), exact), product.__name__


def test_the_largest_sum_is_held_and_more_columns_are_refused() -> None:
    longest = torch.full((1, MOST_COLUMNS), 127, dtype=torch.int8)
    assert int(integer_product(longest, longest)) == MOST_COLUMNS * 127**2 < 2**31
    with pytest.raises(TransformError, match=rf"in_features {MOST_COLUMNS + 1} is more than"):
        W8A8Linear.empty(MOST_COLUMNS + 1, 1)


def test_the_layout_of_the_kernels_is_exact_both_ways() -> None:
    for rows, cols in [(1, 1), (16, 4), (16, 64), (33, 7), (100, 130)]:
        q = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
        kernel = quads_to_kernel(q)
        assert kernel.shape == (-(-rows // 16), -(-cols // 64) * 16, 16, 4) and kernel.is_contiguous()
        torch.testing.assert_close(quads_from_kernel(kernel, rows, cols), q, rtol=0, atol=0)
        assert int(kernel.long().abs().sum()) == int(q.long().abs().sum())  # the rest is zeros
    assert int(quads_to_kernel(torch.arange(17 * 8).view(17, 8).to(torch.int8))[0, 1, 3, 2]) == 3 * 8 + 4 + 2  # block, quad, row, column


def test_the_totals_are_sums_of_rows_and_wrap_around() -> None:
    q = torch.randint(-127, 128, (20, 70), dtype=torch.int8)
    totals = with_totals(quads_to_kernel(q))[:, -1].reshape(-1, 4).contiguous().view(torch.int32)[:, 0]
    assert torch.equal(totals[:20], 128 * q.sum(dim=1, dtype=torch.int32)) and not totals[20:].any()
    long = with_totals(quads_to_kernel(torch.full((1, MOST_COLUMNS), 127, dtype=torch.int8)))[0, -1, 0].view(torch.int32)
    assert (int(long) - 128 * 127 * MOST_COLUMNS) % 2**32 == 0


def test_the_longest_product_is_exact_in_every_kernel(backend: str) -> None:
    layer = W8A8Linear((torch.full((3, MOST_COLUMNS), 127, dtype=torch.int8), torch.ones(3)), None, torch.float32)
    for rows in (1, 20):
        assert (layer(torch.full((rows, MOST_COLUMNS), 127.0)) == torch.tensor(MOST_COLUMNS * 127**2).float()).all()


@STATIC
def test_the_layer_goes_through_its_kernel_layout_unchanged(scale: float | None) -> None:
    layer = make(70, 33, scale=scale)
    (again,) = layer._from_kernel(layer._to_kernel())
    assert torch.equal(again, layer.qweight)


@STATIC
def test_inputs_of_any_form_are_taken(backend: str, scale: float | None) -> None:
    layer = make(64, 24, scale=scale)
    x = torch.randn(2, 3, 64)
    flat = layer(x.reshape(6, 64))
    torch.testing.assert_close(layer(x), flat.view(2, 3, 24))
    torch.testing.assert_close(layer(x[0, 0]), layer(x[:1, 0])[0])
    strided = torch.randn(64, 4).T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=0, atol=0)
    assert layer(x[:0]).shape == (0, 3, 24)
    assert layer(x.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="the input has 32 features, this layer takes 64"):
        layer(torch.randn(2, 32))


def test_a_gradient_reaches_the_input_where_it_did_not_saturate(backend: str) -> None:
    layer = make(64, 24)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer(x.detach()))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 64))
    static = make(2, 4, scale=0.5)
    x = torch.tensor([[1.0, 1e3]], requires_grad=True)
    static(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], torch.stack((static.weight.sum(dim=0)[0], torch.tensor(0.0))))


@STATIC
def test_saved_copied_and_moved_layers_give_the_same_results(backend: str, scale: float | None) -> None:
    layer = make(64, 33, scale=scale)
    x = torch.randn(2, 64)
    expected = layer(x)
    assert set(layer.state_dict()) == {*layer.portable, "bias"}
    assert ("input_scale" in layer.state_dict()) == (scale is not None)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    empty = LAYERS["w8a8_linear"].empty(**layer.layout())  # type: ignore[attr-defined]
    empty.load_state_dict(layer.state_dict())
    assert empty.layout() == layer.layout()
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), empty):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16).float().half().to(torch.bfloat16)
    for name in layer.portable:
        torch.testing.assert_close(layer.state_dict()[name], before[name], rtol=0, atol=0)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


@STATIC
def test_a_state_of_wrong_dtype_shape_or_kind_is_refused(scale: float | None) -> None:
    layer = make(64, 32, scale=scale)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="expected torch"):
        layer.load_state_dict({**state, "qweight": state["qweight"].float()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**state, "scale": state["scale"][:3]})
    with pytest.raises(RuntimeError, match="input_scale"):
        make(64, 32, scale=None if scale else 1.0).load_state_dict(state)


@STATIC
def test_meta_layers_have_the_right_shapes(scale: float | None) -> None:
    with torch.device("meta"):
        layer = W8A8Linear.empty(64, 33, static=scale is not None)
        y = layer(torch.randn(2, 5, 64))
    assert y.is_meta and y.shape == (2, 5, 33)
    real = make(64, 33, scale=scale)
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), real(x))


@STATIC
def test_it_is_a_packed_linear_layer_with_its_bytes(scale: float | None) -> None:
    layer = make(64, 33, scale=scale)
    assert isinstance(layer, PackedLinear) and isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (64, 33, (33, 64))
    assert layer.weight_bytes == sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert "static=" in repr(layer)


@STATIC
def test_a_compiled_model_equals_the_eager_one(backend: str, scale: float | None) -> None:
    torch.compiler.reset()
    model = nn.Sequential(make(64, 32, scale=scale), nn.ReLU(), make(32, 8, bias=False, scale=scale))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        prepare_layers(model)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_weights_and_scales_that_are_no_numbers_are_refused() -> None:
    weight = torch.randn(9, 4)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TransformError, match="expected a positive number"):
            W8A8Linear.from_weight(weight, input_scale=scale)
    weight[6, 1] = torch.nan
    with pytest.raises(TransformError, match="row 6"):
        W8A8Linear.from_weight(weight)
    with pytest.raises(TransformError, match="W8A8Linear"):
        W8A8Linear.from_linear(make(4, 4))


def test_the_weight_is_that_of_weight_only_int8() -> None:
    weight = torch.randn(9, 40)
    layer = W8A8Linear.from_weight(weight)
    for found, expected in zip(layer.tensors(), quantize_rows(weight), strict=True):
        assert torch.equal(found, expected)
