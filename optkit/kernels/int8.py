"""Weight-only int8: one scale per output row, symmetric. Activations stay floats, so it saves memory traffic and no arithmetic."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.guards import dtype_named, refuse_non_finite, refuse_non_matrix, refuse_override, row_chunks
from optkit.kernels.layout import LANES, rows_from_kernel, rows_to_kernel
from optkit.kernels.ops import HALF
from optkit.kernels.packed import Operands, PackedLayer, PackedLinear


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 q (out, in) and float32 scale (out,) so that weight ~ q * scale[:, None].

    The law: scale = max|row| / 127 and q = round(row / scale), so no weight is off by more than half a scale; a row of zeros has scale 0.

    Raises:
        TransformError: the weight is no matrix, or holds NaN or infinity.
    """
    refuse_non_matrix(weight)
    parts = []
    for rows in row_chunks(weight):
        scale = rows.abs().amax(dim=1) / 127
        step = torch.where(scale > 0, scale, 1)[:, None]
        parts.append((torch.round(rows / step).clamp(-127, 127).to(torch.int8), scale))
    q, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    refuse_non_finite(scale)
    return q, scale


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight (out, in) = q * scale[:, None], computed in float32 (float64 for float64) and rounded to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q.to(wide) * scale.to(wide)[:, None]).to(dtype)


def int8_linear_reference(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., in) times the dequantized weight, transposed, plus bias (out,): what the kernels compute, in plain PyTorch."""
    return functional.linear(x, dequantize_rows(q, scale, x.dtype), None if bias is None else bias.to(x.dtype))


class _Rows(PackedLayer):
    """The storage that the linear layer and the embedding have in common."""

    portable: ClassVar[tuple[str, ...]] = ("qweight", "scale")
    replaced: ClassVar[tuple[str, ...]] = ("qweight",)
    qweight: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as floats of this dtype."""
        q, scale = self.tensors()
        return dequantize_rows(q, scale, dtype)

    def column_units(self) -> dict[str, int]:
        """Return that numbers are by column, and scales are not."""
        return {"qweight": 1}

    def _to_kernel(self) -> Tensor:
        return rows_to_kernel(self.tensors()[0])

    def _from_kernel(self, kernel: Tensor) -> tuple[Tensor, ...]:
        rows, cols = self._sizes()
        return (rows_from_kernel(kernel, rows, cols),)

    def _operands(self) -> Operands:
        return Operands(self.scale)


class Int8Linear(_Rows, PackedLinear):
    """A linear layer with int8 weights. It takes no part in training: weight and bias get no gradient, the input does."""

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Return the layer for a float weight (out, in); results of ``.weight`` have its dtype.

        Raises:
            TransformError: the weight holds NaN or infinity.
        """
        return cls(quantize_rows(weight.detach()), bias, (weight.shape[1], weight.shape[0]), weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return the packed form of a plain linear layer.

        Raises:
            TransformError: it has a forward of its own, or NaN or infinity among its weights.
        """
        refuse_override(linear, nn.Linear)
        return cls.from_weight(linear.weight, linear.bias).train(linear.training)

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: bool = True, dtype: str = "float32") -> Self:
        """Return a layer of zeros, to load a state into."""
        kind = dtype_named(dtype)
        tensors = (torch.zeros(out_features, in_features, dtype=torch.int8), torch.zeros(out_features))
        return cls(tensors, torch.zeros(out_features, dtype=kind) if bias else None, (in_features, out_features), kind)

    @classmethod
    def tied_to(cls, embedding: Int8Embedding, bias: Tensor | None = None) -> Self:
        """Return the output layer that shares the weight of an embedding: one storage, saved once, by the embedding."""
        layer = cls((), bias, (embedding.embedding_dim, embedding.num_embeddings), embedding.compute_dtype)
        layer._owner = (embedding,)
        return layer

    def _forward_torch(self, input: Tensor) -> Tensor:
        if not input.is_cuda:
            return super()._forward_torch(input)
        q, scale = self.tensors()  # the sums are scaled and not the weight, so that a compiled graph reads int8 from memory
        output = (functional.linear(input, q.to(input.dtype)) * scale).to(input.dtype)
        return output if self.bias is None else output + self.bias.to(input.dtype)

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: weights, scales and bias."""
        return self.out_features * (self.in_features + 4) + (0 if self.bias is None else self.bias.nbytes)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``. For a tied layer (``tied`` is not None) the caller records what it is tied to."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None, "dtype": dtype}


class Int8Embedding(_Rows, nn.Embedding):
    """An embedding with int8 rows; a look-up dequantizes the rows it needs, into ``compute_dtype``.

    ``multiplier`` scales what a look-up returns, as the embeddings of Gemma and BART do; ``weight`` and a tied head are without it.
    """

    def __init__(self, tensors: tuple[Tensor, ...], padding_idx: int | None, compute_dtype: torch.dtype, multiplier: float = 1.0) -> None:
        super().__init__(tensors, compute_dtype)
        self.num_embeddings, self.embedding_dim = tensors[0].shape
        self.padding_idx = padding_idx
        self.multiplier = multiplier
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, multiplier: float | None = None) -> Self:
        """Return the packed form of a plain embedding, or of one whose forward is a look-up times ``multiplier``.

        Raises:
            TransformError: it has a forward of its own and no multiplier is given, renormalizes rows (``max_norm``), or holds NaN or
                infinity.
        """
        if multiplier is None:
            refuse_override(embedding, nn.Embedding)
        if embedding.max_norm is not None:
            raise TransformError("an embedding with max_norm changes its rows as it reads them and cannot be packed; exclude this layer")
        weight = embedding.weight.detach()
        packed = cls(quantize_rows(weight), embedding.padding_idx, weight.dtype, 1.0 if multiplier is None else multiplier)
        return packed.train(embedding.training)

    @classmethod
    def empty(
        cls, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, dtype: str = "float32", multiplier: float = 1.0
    ) -> Self:
        """Return an embedding of zeros, to load a state into."""
        tensors = (torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8), torch.zeros(num_embeddings))
        return cls(tensors, padding_idx, dtype_named(dtype), multiplier)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (num_embeddings, embedding_dim): a new tensor at every access, and it cannot be set."""
        return self.dequantize(self.compute_dtype)

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: one row and its scale."""
        return self.embedding_dim + 4

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "padding_idx": self.padding_idx}
        return {**sizes, "dtype": dtype, "multiplier": self.multiplier}

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) that whole numbers (...) name, times the multiplier.

        Raises:
            IndexError: a number is negative, or not less than ``num_embeddings``.
        """
        plan = self.plan
        if is_compiling() or plan is None or self.compute_dtype not in HALF or type(input) is not Tensor or not input.is_cpu:
            return self._forward_torch(input)
        ids = input.contiguous().long()
        output = self.scale.new_empty((*ids.shape, self.embedding_dim), dtype=self.compute_dtype)
        status = plan.native.gather(plan.address, ids.data_ptr(), output.data_ptr(), ids.numel(), HALF[self.compute_dtype])
        if status:
            raise IndexError(f"an index is out of range: the embedding has {self.num_embeddings} rows")
        return output if self.multiplier == 1 else output.mul_(self.multiplier)

    def _forward_torch(self, input: Tensor) -> Tensor:
        scale = functional.embedding(input, self.scale[:, None])
        if self.kernel is None:
            rows = functional.embedding(input, self.qweight)
        else:
            rows = self.kernel[input // LANES, :, input % LANES][..., : self.embedding_dim]
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        found = (rows.to(wide) * scale.to(wide)).to(self.compute_dtype)
        return found if self.multiplier == 1 else found * self.multiplier

    def _sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim
