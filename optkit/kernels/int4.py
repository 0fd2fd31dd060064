"""Weight-only int4 in groups of columns: 4 bits a weight and 4 bytes a group. Coarser than int8, and small models feel it.

The kernels round the inputs of a few rows to 16-bit fixed point, with one step for a group of columns (at most 128 of them): an error of
at most 1/65534 of the largest input in it. With AVX512-BF16, the inputs of many rows are rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.clipping import SHRINKS, search, search_symmetric
from optkit.kernels.guards import dtype_named, refuse_non_finite, refuse_non_matrix, refuse_override, row_chunks
from optkit.kernels.layout import groups_from_kernel, groups_to_kernel, pack_nibbles, unpack_nibbles
from optkit.kernels.packed import Operands, PackedLinear
from optkit.kernels.tinygemm import Tiles, fits, product, tiles_of

GROUP_SIZES = (32, 64, 128)  # those of common use
GROUP_STEP = 32  # the kernels take any multiple of it


def quantize_groups(
    weight: Tensor, group_size: int, clip_search: bool = True, symmetric: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (out, in / 2), two numbers 0..15 a byte with the even column low, and bfloat16 scale and point (out, in / group_size).

    The law: weight ~ (q - point) * scale within each group of ``group_size`` columns of a row, and q = round(weight / scale + point).
    Without the search, the range of the group is divided by 15. The search tries smaller ranges, fits scale and point to the rounded
    numbers by least squares, and keeps for every group what gives the least squared error; the error never grows by it.
    Scale and point are rounded to bfloat16 before the numbers are chosen, so that rounding them costs next to nothing. A group of one
    value has that value as its scale.

    Args:
        weight: (out, in), floats.
        group_size: columns that share a scale, a multiple of 32.
        clip_search: whether smaller ranges are tried.
        symmetric: the point is 8 everywhere, and a scale may be negative.
        importance: (in,), positive: what a squared error in a column counts, such as the mean square of its inputs; None: all alike.

    Raises:
        TransformError: the group size does not divide the columns, the weight is no matrix, or it holds NaN or infinity.
    """
    refuse_non_matrix(weight)
    refuse_group_size(weight.shape[1], group_size)
    find, shrinks = (search_symmetric if symmetric else search), (SHRINKS if clip_search else ())
    counts = None if importance is None else importance.float().reshape(-1, group_size)
    parts = [find(rows.reshape(len(rows), -1, group_size), shrinks, counts) for rows in row_chunks(weight)]
    scale, point = torch.cat([part.scale for part in parts]), torch.cat([part.point for part in parts])
    refuse_non_finite(scale.float() + point.float())
    return torch.cat([pack_nibbles(part.q.flatten(1)) for part in parts]), scale, point


def dequantize_groups(q: Tensor, scale: Tensor, point: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight (out, in) = (q - point) * scale, computed in float32 (float64 for float64) and rounded to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = unpack_nibbles(q).reshape(*scale.shape, -1).to(wide)
    return numbers.sub_(point.to(wide)[..., None]).mul_(scale.to(wide)[..., None]).flatten(1).to(dtype)


def int4_linear_reference(x: Tensor, q: Tensor, scale: Tensor, point: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., in) times the dequantized weight, transposed, plus bias (out,): what the kernels compute, in plain PyTorch."""
    return functional.linear(x, dequantize_groups(q, scale, point, x.dtype), None if bias is None else bias.to(x.dtype))


def refuse_group_size(in_features: int, group_size: int) -> None:
    """Refuse a group size that is no multiple of 32, which the kernels need, or that does not divide the columns.

    Raises:
        TransformError: the message names sizes that would work.
    """
    if group_size > 0 and group_size % GROUP_STEP == 0 and in_features % group_size == 0:
        return
    if in_features % GROUP_STEP:
        remedy = f"no group size divides it, as all are multiples of {GROUP_STEP}: exclude this layer or use int8"
    else:
        fitting = dict.fromkeys([size for size in GROUP_SIZES if in_features % size == 0] + [in_features])
        remedy = f"use {' or '.join(map(str, fitting))}"
    if group_size > 0 and group_size % GROUP_STEP == 0:
        raise TransformError(f"group size {group_size} does not divide in_features {in_features}; {remedy}")
    raise TransformError(
        f"group size {group_size} has no kernel for in_features {in_features}, it is no multiple of {GROUP_STEP}; {remedy}"
    )


class Int4Linear(PackedLinear):
    """A linear layer with int4 weights. It takes no part in training: weight and bias get no gradient, the input does.

    ``tensors`` are q (out, in / 2) with scale and point (out, groups), both bfloat16 or both float16; see ``quantize_groups``.
    """

    portable: ClassVar[tuple[str, ...]] = ("qweight", "scale", "point")
    replaced: ClassVar[tuple[str, ...]] = ("qweight", "scale", "point")

    def __init__(self, tensors: tuple[Tensor, ...], bias: Tensor | None, group_size: int, compute_dtype: torch.dtype) -> None:
        rows, half = tensors[0].shape
        super().__init__(tensors, bias, (2 * half, rows), compute_dtype)
        self.group_size = group_size
        self.scale_dtype = tensors[1].dtype
        self.tiles: Tiles | None = None  # on CUDA; the portable numbers are in the memory of the host meanwhile

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, group_size: int = 64, clip_search: bool = True) -> Self:
        """Return the layer for a float weight (out, in); results of ``.weight`` have its dtype.

        Raises:
            TransformError: see ``quantize_groups``.
        """
        return cls(quantize_groups(weight.detach(), group_size, clip_search), bias, group_size, weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64, clip_search: bool = True) -> Self:
        """Return the packed form of a plain linear layer.

        Raises:
            TransformError: it has a forward of its own; or see ``quantize_groups``.
        """
        refuse_override(linear, nn.Linear)
        return cls.from_weight(linear.weight, linear.bias, group_size, clip_search).train(linear.training)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        group_size: int = 64,
        bias: bool = True,
        dtype: str = "float32",
        scale_dtype: str = "bfloat16",
    ) -> Self:
        """Return a layer of zeros, to load a state into.

        Raises:
            TransformError: the group size does not divide ``in_features``.
        """
        refuse_group_size(in_features, group_size)
        kind, groups = dtype_named(dtype), (out_features, in_features // group_size)
        numbers = torch.zeros(out_features, in_features // 2, dtype=torch.uint8)
        scale, point = (torch.zeros(groups, dtype=dtype_named(scale_dtype)) for _ in range(2))
        return cls((numbers, scale, point), torch.zeros(out_features, dtype=kind) if bias else None, group_size, kind)

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: numbers, scales, points and bias."""
        groups = self.in_features // self.group_size
        return self.out_features * (self.in_features // 2 + 4 * groups) + (0 if self.bias is None else self.bias.nbytes)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        dtype, scale_dtype = (str(kind).removeprefix("torch.") for kind in (self.compute_dtype, self.scale_dtype))
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "group_size": self.group_size}
        return {**sizes, "bias": self.bias is not None, "dtype": dtype, "scale_dtype": scale_dtype}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out_features, in_features) as floats of this dtype."""
        q, scale, point = self.tensors()
        return dequantize_groups(q, scale, point, dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors in the portable layout, whichever layout is in memory, and all on one device."""
        q, *rest = super().tensors()
        return (q.to(rest[0].device), *rest)

    def column_units(self) -> dict[str, int]:
        """Return that two numbers share a byte, and a group its scale and point."""
        return {"qweight": 2, "scale": self.group_size, "point": self.group_size}

    def prepare_on_cuda(self) -> None:
        """Make the layout of tinygemm, where the layer is on CUDA and fits; the portable numbers go to the host's memory."""
        scale = self._buffers["scale"]
        if self.tiles is not None or scale is None or not scale.is_cuda or scale.dtype != torch.bfloat16:
            return
        if fits(*self._sizes(), self.group_size):
            self.tiles = tiles_of(*self.tensors())
            self._buffers["qweight"] = self._buffers["qweight"].cpu()  # type: ignore[union-attr]

    def restore(self) -> None:
        """Go back to the portable layout."""
        super().restore()
        if self.tiles is not None:
            self._buffers["qweight"] = self.tensors()[0]
            self.tiles = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tiles": None}

    def _forward_torch(self, input: Tensor) -> Tensor:
        frozen = not (torch.is_grad_enabled() and input.requires_grad)
        if not (input.is_cuda and input.dtype == torch.bfloat16 and frozen):
            return super()._forward_torch(input)
        if self.tiles is None and not is_compiling():
            self.prepare_on_cuda()
        if self.tiles is None:
            return super()._forward_torch(input)
        return product(input, self.tiles, self.group_size, self.bias)

    def _to_kernel(self) -> Tensor:
        q, scale, point = self.tensors()
        return groups_to_kernel(q, scale, point)

    def _from_kernel(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return groups_from_kernel(kernel, self.out_features, self.in_features, self.scale_dtype)

    def _operands(self) -> Operands:
        return Operands(group=self.group_size, float16=self.scale_dtype is torch.float16)
