"""Int8 weights and int8 activations: products of whole numbers, scaled once a result. One large value in a row coarsens the whole row."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.guards import dtype_named, refuse_override
from optkit.kernels.int8 import dequantize_rows, quantize_rows
from optkit.kernels.layout import quads_from_kernel, quads_to_kernel, with_totals
from optkit.kernels.packed import Operands, PackedLinear

MOST_COLUMNS = (2**31 - 1) // 127**2  # more of them, and a sum could leave int32
_EXACT_COLUMNS = 1024  # sums of so many products of int8 are whole numbers that float32 holds
_exact: dict[str, bool] = {}  # what was found out, known before a graph is traced; marking a function as constant would import the tracer


def quantize_tokens(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 q (..., in) and scale (..., 1) so that x ~ q * scale, in float32 (float64 for float64).

    The law: q = round(x / scale), halves to even, held within -127..127. Without ``input_scale`` (shape (1,)) each row has a scale of its
    own, max|row| / 127; with it all rows share it and values beyond 127 times it saturate. A row with NaN or infinity has scale NaN, so
    that all its results are NaN; a scale of 0 makes zeros.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = wide.abs().amax(dim=-1, keepdim=True)
    scale = most / 127 if input_scale is None else input_scale.to(wide.dtype).expand(most.shape)
    step = torch.where(scale > 0, scale, torch.inf)
    finite = torch.isfinite(most)
    q = torch.where(finite, wide / step, 0).round_().clamp_(-127, 127).to(torch.int8)
    return q, torch.where(finite, scale, torch.nan)


def w8a8_linear_reference(x: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return y (..., out) in the dtype of x: y[m, r] = sum_k xq[m, k] q[r, k] * scale_x[m] * scale[r] + bias[r], the sums in int64.

    Args:
        x: floats (..., in).
        q: int8 weight (out, in).
        scale: float32 (out,).
        input_scale: float32 (1,) for static activations; None for one scale a row of x. See ``quantize_tokens``.
        bias: (out,).
    """
    tokens, token_scale = quantize_tokens(x, input_scale)
    return _scaled(tokens.long() @ q.long().T, token_scale, scale, bias, x.dtype)


def integer_product(tokens: Tensor, q: Tensor) -> Tensor:
    """Return the int32 sums (m, out) of int8 tokens (m, in) times int8 weight (out, in), transposed. They are exact.

    By ``torch._int_mm`` on CUDA (which wants more than 16 rows and multiples of 8: the rest is padded with zeros) and on CPUs where it is
    exact; elsewhere by float32 products of so few columns that no sum is rounded.
    """
    if not tokens.numel():
        return torch.zeros(tokens.shape[0], q.shape[0], dtype=torch.int32, device=tokens.device)
    if tokens.device.type == "cuda":
        return _padded_product(tokens, q)
    if tokens.device.type == "meta" or (tokens.device.type == "cpu" and int_mm_is_exact()):
        return torch._int_mm(tokens, q.T)
    return _float_product(tokens, q)


def int_mm_is_exact() -> bool:
    """Say whether ``torch._int_mm`` adds exactly on this CPU: without VNNI, pairs of products saturate in 16 bits."""
    if "cpu" not in _exact:
        _exact["cpu"] = _int_mm_is_exact()
    return _exact["cpu"]


def _int_mm_is_exact() -> bool:
    most = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    sums = [torch._int_mm(most[:rows], sign * most.T) for rows in (1, 32) for sign in (1, -1)]
    return all(bool((found.abs() == 64 * 127**2).all()) for found in sums)


def _padded_product(tokens: Tensor, q: Tensor) -> Tensor:
    columns, rows, outputs = -q.shape[1] % 8, max(0, 32 - tokens.shape[0]), -q.shape[0] % 8
    sums = torch._int_mm(functional.pad(tokens, (0, columns, 0, rows)), functional.pad(q, (0, columns, 0, outputs)).T)
    return sums[: tokens.shape[0], : q.shape[0]]


def _float_product(tokens: Tensor, q: Tensor) -> Tensor:
    parts = zip(tokens.split(_EXACT_COLUMNS, dim=1), q.split(_EXACT_COLUMNS, dim=1), strict=True)
    return torch.stack([(left.float() @ right.float().T).to(torch.int32) for left, right in parts]).sum(dim=0, dtype=torch.int32)


class W8A8Linear(PackedLinear):
    """A linear layer with int8 weights that rounds its input to int8. The gradient of the input passes the rounding unchanged.

    ``tensors`` are q (out, in) and scale (out,) of ``quantize_rows``, and for static activations ``input_scale`` (1,), float32.
    """

    replaced: ClassVar[tuple[str, ...]] = ("qweight",)
    qweight: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(self, tensors: tuple[Tensor, ...], bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        rows, columns = tensors[0].shape
        if columns > MOST_COLUMNS:
            raise TransformError(
                f"in_features {columns} is more than {MOST_COLUMNS}, and sums of int8 products could leave int32; use int8"
            )
        self.static = len(tensors) == 3
        int_mm_is_exact()
        super().__init__(tensors, bias, (columns, rows), compute_dtype)

    @property
    def portable(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the saved buffers; the last one only where the scale of the input is static."""
        return ("qweight", "scale", "input_scale") if self.static else ("qweight", "scale")

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, input_scale: float | None = None) -> Self:
        """Return the layer for a float weight (out, in); with ``input_scale``, activations are static.

        Raises:
            TransformError: the weight holds NaN or infinity, or has too many columns; or the scale is no positive number.
        """
        if input_scale is not None and not 0 < input_scale < float("inf"):
            raise TransformError(f"the scale of the input is {input_scale}, expected a positive number")
        static = () if input_scale is None else (torch.tensor([input_scale], dtype=torch.float32, device=weight.device),)
        return cls((*quantize_rows(weight.detach()), *static), bias, weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_scale: float | None = None) -> Self:
        """Return the packed form of a plain linear layer.

        Raises:
            TransformError: it has a forward of its own; or see ``from_weight``.
        """
        refuse_override(linear, nn.Linear)
        return cls.from_weight(linear.weight, linear.bias, input_scale).train(linear.training)

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: bool = True, dtype: str = "float32", static: bool = False) -> Self:
        """Return a layer of zeros, to load a state into."""
        kind = dtype_named(dtype)
        tensors = (torch.zeros(out_features, in_features, dtype=torch.int8), torch.zeros(out_features))
        return cls((*tensors, torch.zeros(1)) if static else tensors, torch.zeros(out_features, dtype=kind) if bias else None, kind)

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: weights, scales and bias."""
        return self.out_features * (self.in_features + 4) + 4 * self.static + (0 if self.bias is None else self.bias.nbytes)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return {**sizes, "dtype": str(self.compute_dtype).removeprefix("torch."), "static": self.static}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as floats of this dtype."""
        q, scale, *_ = self.tensors()
        return dequantize_rows(q, scale, dtype)

    def column_units(self) -> dict[str, int]:
        """Return that numbers are by column; the scale of the input is the whole input's, and must be known beforehand.

        Raises:
            TransformError: it is found anew for each token.
        """
        if not self.static:
            raise TransformError("a scale for each token is found from all of its inputs, and no process has them all: activations: static")
        return {"qweight": 1}

    def _to_kernel(self) -> Tensor:
        return with_totals(quads_to_kernel(self.tensors()[0]))

    def _from_kernel(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return (quads_from_kernel(kernel[:, :-1], self.out_features, self.in_features),)

    def _operands(self) -> Operands:
        return Operands(self.scale, self.input_scale if self.static else None, integer=True)

    def _forward_torch(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"the input has {input.shape[-1]} features, this layer takes {self.in_features}")
        q, scale, *static = self.tensors()
        input_scale = static[0] if static else None
        if not (torch.is_grad_enabled() and input.requires_grad):
            return _multiply(input, q, scale, input_scale, self.bias)
        output: Tensor = _PassThrough.apply(input, q, scale, input_scale, self.bias)  # type: ignore[no-untyped-call]
        return output


class _PassThrough(torch.autograd.Function):
    """The product, with the gradient of a linear layer of the dequantized weight: none where a static scale has saturated the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale, None if input_scale is None else input.abs() <= 127.5 * input_scale)
        return _multiply(input, q, scale, input_scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, scale, within = ctx.saved_tensors
        found = grad @ dequantize_rows(q, scale, grad.dtype)
        return (found if within is None else found * within, None, None, None, None)


def _multiply(input: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    tokens, token_scale = quantize_tokens(input.reshape(-1, input.shape[-1]), input_scale)
    output = _scaled(integer_product(tokens, q), token_scale, scale, bias, input.dtype)
    return output.reshape(*input.shape[:-1], q.shape[0])


def _scaled(sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = token_scale.dtype
    output = sums.to(wide) * token_scale * scale.to(wide)
    return (output if bias is None else output + bias.to(wide)).to(dtype)
