from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.kernels.int8 import Int8Embedding, Int8Linear, dequantize_rows, int8_linear_reference, quantize_rows
from optkit.kernels.layout import rows_from_kernel, rows_to_kernel


def test_no_weight_is_off_by_more_than_half_a_scale() -> None:
    for shape in [(1, 1), (7, 5), (300, 129)]:
        weight = torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]
        q, scale = quantize_rows(weight)
        assert q.dtype == torch.int8 and scale.dtype == torch.float32
        assert (dequantize_rows(q, scale, torch.float64) - weight).abs().le(0.5001 * scale[:, None].double()).all()
        assert (q.abs().amax(dim=1) == 127).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = -5
    q, scale = quantize_rows(weight)
    torch.testing.assert_close(dequantize_rows(q, scale), weight)
    assert scale.tolist() == [0.0, pytest.approx(5 / 127), 0.0]


def test_large_weights_are_quantized_in_bands_as_in_one_piece() -> None:
    weight = torch.randn(2100, 1024)
    q, scale = quantize_rows(weight)
    torch.testing.assert_close(q[2000:], quantize_rows(weight[2000:])[0], rtol=0, atol=0)
    assert q.shape == weight.shape and scale.shape == (2100,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_with_the_row(bad: float) -> None:
    weight = torch.randn(9, 4)
    weight[6, 1] = bad
    with pytest.raises(TransformError, match="in 1 of 9 rows, first in row 6"):
        quantize_rows(weight)
    with pytest.raises(TransformError, match="row 6"):
        Int8Linear.from_weight(weight)


@pytest.mark.parametrize("weight", [torch.randn(4), torch.randn(2, 3, 4), torch.zeros(0, 4), torch.ones(3, 3, dtype=torch.int32)])
def test_what_is_no_float_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(TransformError, match="float matrix"):
        quantize_rows(weight)


def test_the_layout_of_the_kernels_is_exact_both_ways() -> None:
    for shape in [(1, 1), (16, 4), (33, 7), (100, 130)]:
        q = torch.randint(-127, 128, shape, dtype=torch.int8)
        kernel = rows_to_kernel(q)
        assert kernel.shape[2] == 16 and kernel.shape[1] % 4 == 0
        torch.testing.assert_close(rows_from_kernel(kernel, *shape), q, rtol=0, atol=0)


def test_the_reference_and_the_layer_agree(backend: str) -> None:
    weight, bias, x = torch.randn(40, 50), torch.randn(40), torch.randn(3, 50)
    layer = Int8Linear.from_weight(weight, bias)
    torch.testing.assert_close(layer(x), int8_linear_reference(x, *quantize_rows(weight), bias))


def test_layers_with_a_forward_of_their_own_are_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    with pytest.raises(TransformError, match="Scaled is a Embedding with a forward of its own"):
        Int8Embedding.from_embedding(Scaled(4, 4))
    with pytest.raises(TransformError, match="Int8Linear"):
        Int8Linear.from_linear(Int8Linear.from_weight(torch.randn(4, 4)))
    with pytest.raises(TransformError, match="max_norm"):
        Int8Embedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_look_up_gives_the_dequantized_rows(backend: str, dtype: torch.dtype) -> None:
    plain = nn.Embedding(37, 21, dtype=dtype)
    embedding = Int8Embedding.from_embedding(plain)
    ids = torch.randint(0, 37, (2, 5))
    expected = embedding.weight[ids]
    for _ in range(2):
        assert embedding(ids).dtype == dtype
        torch.testing.assert_close(embedding(ids), expected, rtol=0, atol=0)
        torch.testing.assert_close(embedding(ids.T.int()), expected.transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(embedding(ids[0, 0]), expected[0, 0], rtol=0, atol=0)
        assert embedding(ids[:0]).shape == (0, 5, 21)
        embedding.prepare()
    torch.testing.assert_close(expected.float(), plain.weight[ids].float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (37, 21), (48, 64), (17, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_whole_weight_is_the_same_floats_in_both_layouts(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = Int8Linear.from_weight(torch.randn(shape))
    expected = dequantize_rows(*layer.tensors(), dtype)
    for _ in range(2):
        assert torch.equal(layer.dequantize(dtype), expected)
        layer.prepare()


def test_an_index_out_of_range_is_refused_in_both_layouts(backend: str) -> None:
    embedding = Int8Embedding.from_embedding(nn.Embedding(20, 8))
    for _ in range(2):
        for bad in (-1, 20, 1 << 40):
            with pytest.raises(IndexError, match="out of range"):
                embedding(torch.tensor([0, bad]))
        embedding.prepare()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Int8Embedding.from_embedding(nn.Embedding(50, 24))
        self.head = Int8Linear.tied_to(self.embed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


def test_a_tied_head_shares_one_storage_and_is_saved_once(backend: str) -> None:
    model = Tied()
    ids = torch.randint(0, 50, (2, 2))
    weight = model.embed.weight
    for _ in range(2):  # before and after the layout of the kernels is made
        torch.testing.assert_close(model(ids), weight[ids] @ weight.T)
        assert set(model.state_dict()) == {"embed.qweight", "embed.scale"}
    assert not list(model.head.buffers()) and not list(model.parameters())
    assert model.head.tied is model.embed
    torch.testing.assert_close(model.head.weight, weight, rtol=0, atol=0)


def test_a_tied_head_follows_its_embedding(backend: str) -> None:
    model, ids = Tied(), torch.randint(0, 50, (2, 2))
    expected = model(ids)
    twin = copy.deepcopy(model)
    assert twin.head.tied is twin.embed
    model.embed.load_state_dict({"qweight": torch.zeros(50, 24, dtype=torch.int8), "scale": torch.ones(50)})
    assert (model(ids) == 0).all()
    torch.testing.assert_close(twin(ids), expected)
    half = twin.to(torch.bfloat16)(ids)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1)
    assert twin.to("meta")(ids.to("meta")).shape == (2, 2, 50)


def test_a_tied_model_can_be_compiled(backend: str) -> None:
    model, ids = Tied(), torch.randint(0, 50, (2, 2))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected)


def test_the_bytes_for_one_token_are_counted() -> None:
    assert Int8Linear.from_weight(torch.randn(8, 10), torch.zeros(8)).weight_bytes == 8 * 10 + 8 * 4 + 8 * 4
    assert Int8Embedding.from_embedding(nn.Embedding(9, 10)).weight_bytes == 14
