"""A linear layer that stores a bit for every weight and the values of those that are not zero, and skips the zeros when it runs.

On CPUs few rows of input go through a kernel for AVX-512; for many rows, and elsewhere, PyTorch multiplies by the weight written out. On
CUDA a 2:4 pattern in half precision runs on the units for it.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.guards import dtype_named, refuse_non_finite, refuse_non_matrix
from optkit.kernels.native import LADDER, Native, native
from optkit.kernels.packed import Operands, PackedLinear, is_plain

FEW_ROWS = 8
_LANES = 16  # columns of one word of bits, and numbers that a kernel may read beyond the last value
_STRIP = 1 << 20  # weights that are written out at once
_HALF = {torch.float32: 0, torch.bfloat16: 1}


class SparseStruct(ctypes.Structure):
    """A sparse weight as the C code sees it; the fields follow ``struct sparse`` in sparse.c."""

    _fields_ = (
        ("bits", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("half", ctypes.c_int64),
    )


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bits (out, words of 16 columns, 2) as uint8 and the values (n,) of a weight (out, in), in its dtype, row by row.

    Bit b of a word, counted from the lowest of its first byte, says whether column 16 * word + b is stored.

    Raises:
        TransformError: the weight is no matrix, or holds NaN or infinity.
    """
    refuse_non_matrix(weight)
    refuse_non_finite(weight)
    kept = weight != 0
    words = -(-weight.shape[1] // _LANES)
    padded = functional.pad(kept, (0, words * _LANES - weight.shape[1])).view(len(weight), words, 2, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=weight.device)
    return (padded * places).sum(-1, dtype=torch.uint8), weight[kept]


def expand(bits: Tensor, values: Tensor, cols: int) -> Tensor:
    """Return the weight (out, cols) of bits and values: what the kernel computes with, in plain PyTorch."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits[..., None] >> places) & 1).bool().flatten(1)[:, :cols]
    weight = values.new_zeros(len(bits), cols)
    weight[kept] = values
    return weight


def fits_semi_structured(weight: Tensor) -> bool:
    """Say whether a weight is one for CUDA's units of 2:4: in half precision, of sizes they take, at most 2 of every 4 columns not zero."""
    if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16) or any(size % 64 for size in weight.shape):
        return False
    return bool(((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())


def semi_structured(weight: Tensor) -> Tensor:
    """Return the weight as PyTorch's semi-structured tensor, whose products skip half of the arithmetic (torch.sparse, documentation)."""
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        return to_sparse_semi_structured(weight)


class SparseLinear(PackedLinear):
    """A linear layer without its zeros. For inference: weight and bias get no gradient, the input does."""

    portable: ClassVar[tuple[str, ...]] = ("bits", "values")
    replaced: ClassVar[tuple[str, ...]] = ("values",)
    bits: Tensor
    values: Tensor

    def __init__(self, tensors: tuple[Tensor, ...], bias: Tensor | None, sizes: tuple[int, int]) -> None:
        super().__init__(tensors, bias, sizes, tensors[1].dtype)
        self.stored = len(tensors[1])
        self._struct: tuple[SparseStruct, tuple[Tensor, ...]] | None = None  # and what keeps its addresses alive
        self._dense: Tensor | None = None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Return the layer for a weight (out, in).

        Raises:
            TransformError: the weight holds NaN or infinity.
        """
        return cls(compress(weight.detach()), bias, (weight.shape[1], weight.shape[0]))

    @classmethod
    def empty(cls, in_features: int, out_features: int, stored: int, bias: bool = True, dtype: str = "float32") -> Self:
        """Return a layer of zeros, to load a state into."""
        kind = dtype_named(dtype)
        words = -(-in_features // _LANES)
        tensors = (torch.zeros(out_features, words, 2, dtype=torch.uint8), torch.zeros(stored, dtype=kind))
        return cls(tensors, torch.zeros(out_features, dtype=kind) if bias else None, (in_features, out_features))

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty`` that make a layer of this shape, as JSON."""
        dtype = str(self.tensors()[1].dtype).removeprefix("torch.")
        bias = self.bias is not None
        return {"in_features": self.in_features, "out_features": self.out_features, "stored": self.stored, "bias": bias, "dtype": dtype}

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: bits, values and bias."""
        held = self.tensors()[1].element_size() * self.stored
        return self.bits.nbytes + held + (0 if self.bias is None else self.bias.nbytes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) with its zeros."""
        bits, values = self.tensors()
        return expand(bits, values, self.in_features).to(dtype)

    def prepare(self) -> bool:
        """Make ready for the kernel; return False where it cannot run."""
        if self._struct is not None:
            return True
        found = native()
        if self.bits.device.type != "cpu" or not _has_kernel(found) or self.tensors()[1].dtype not in _HALF:
            return False
        if self.kernel is None:
            self.kernel = self._to_kernel()
            self._buffers["values"] = None
        counts = _ONES[self.bits.flatten(1).long()].sum(1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]]).contiguous()
        bits = self.bits.contiguous()
        addresses = (tensor.data_ptr() for tensor in (bits, self.kernel, starts))
        struct = SparseStruct(*addresses, self.out_features, self.in_features, _HALF[self.kernel.dtype])
        self._struct = struct, (bits, self.kernel, starts)
        return True

    def restore(self) -> None:
        """Go back to the portable tensors."""
        self._struct = self._dense = None
        super().restore()

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b for an input (..., in_features), in its dtype.

        Raises:
            RuntimeError: the input has another number of features.
        """
        if is_compiling():
            bias = None if self.bias is None else self.bias.float()
            if self._struct is None or (torch.is_grad_enabled() and input.requires_grad):
                return self._forward_torch(input)
            bits, values, starts = self._struct[1]
            output: Tensor = sparse_linear(input, bits, values, starts, bias, self.out_features, self.in_features)
            return output
        if not is_plain(input) or not self.prepare():
            return self._forward_torch(input)
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"the input has {input.shape[-1]} features, this layer takes {self.in_features}")
        assert self._struct is not None
        return _multiply(self._struct[0], input, None if self.bias is None else self.bias.float(), self._struct[1][1].dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_struct": None, "_dense": None}

    def _forward_torch(self, input: Tensor) -> Tensor:
        if self._dense is None or self._dense.dtype != input.dtype or self._dense.device != input.device:
            dense = self.dequantize(input.dtype)  # kept: to write it out takes longer than to multiply by it
            self._dense = semi_structured(dense) if fits_semi_structured(dense) else dense
        return functional.linear(input, self._dense, None if self.bias is None else self.bias.to(input.dtype))

    def _to_kernel(self) -> Tensor:
        return functional.pad(self.tensors()[1], (0, _LANES))

    def _from_kernel(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (kernel[: self.stored].clone(),)

    def _operands(self) -> Operands:
        raise TransformError("a sparse layer has no operands of the packed kernels")


def explain_sparse() -> str:
    """Return how sparse layers run on this machine's processor, for a report."""
    if _has_kernel(native()):
        return f"sparse layers skip their zeros for at most {FEW_ROWS} rows of input, and are written out densely for more"
    return "sparse layers are written out densely, so their speed is simulated: no AVX-512 kernel runs here"


_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])


def _has_kernel(found: Native | None) -> bool:
    return found is not None and LADDER.index(found.backend) >= LADDER.index("avx512")


def _multiply(struct: SparseStruct, input: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """Return input (..., cols) times a sparse weight, plus a float32 bias (rows,), in the dtype of the input."""
    found = native()
    assert found is not None
    rows = input.numel() // max(1, struct.cols)
    if rows > FEW_ROWS:
        return _multiply_by_strips(found, struct, input, bias, kind)
    x = input.float().contiguous()
    output = torch.empty(*input.shape[:-1], struct.rows)
    place = None if bias is None else bias.data_ptr()
    found.sparse_few(ctypes.byref(struct), x.data_ptr(), place, output.data_ptr(), rows, torch.get_num_threads())
    return output.to(input.dtype)


def _multiply_by_strips(found: Native, struct: SparseStruct, input: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """Write out as many rows of the weight as stay in the cache, multiply by them, and go on with the next."""
    output = input.new_empty((*input.shape[:-1], struct.rows))
    height = max(_LANES, _STRIP // struct.cols)
    words = -(-struct.cols // _LANES)
    strip = torch.empty(min(height, struct.rows), struct.cols, dtype=kind)
    for start in range(0, struct.rows, height):
        end = min(start + height, struct.rows)
        part = SparseStruct(
            struct.bits + start * words * 2, struct.values, struct.starts + start * 8, end - start, struct.cols, struct.half
        )
        found.sparse_dense(ctypes.byref(part), strip.data_ptr(), torch.get_num_threads())
        output[..., start:end] = functional.linear(input, strip[: end - start].to(input.dtype))
    return output if bias is None else output + bias.to(input.dtype)


@torch.library.custom_op("optkit::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(input: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None, rows: int, cols: int) -> Tensor:
    """Return input (..., cols) times a sparse weight (rows, cols), plus a float32 bias (rows,), in the dtype of the input."""
    struct = SparseStruct(bits.data_ptr(), values.data_ptr(), starts.data_ptr(), rows, cols, _HALF[values.dtype])
    output = _multiply(struct, input, bias, values.dtype)
    return output.clone() if output.data_ptr() == input.data_ptr() else output


@sparse_linear.register_fake
def _shape(input: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None, rows: int, cols: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], rows))
