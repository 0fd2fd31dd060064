"""Layers that train as what they will be packed into: float weights, rounded at every forward. They train the weights, not the speed.

torchao's fake quantizers (torchao.quantization.qat) do not fit: their zero points are whole numbers and their ranges the plain extremes,
where the packed int4 layer has a fractional point in bfloat16 and a clipped range, so what was trained would not be what is packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.guards import refuse_non_finite
from optkit.kernels.int4 import Int4Linear, quantize_groups
from optkit.kernels.int8 import Int8Embedding, Int8Linear, dequantize_rows, quantize_rows
from optkit.kernels.layout import pack_nibbles

_LEVELS = 15


def fake_rows(weight: Tensor) -> Tensor:
    """Return float32 rows (out, in) as int8 would give them back, bit for bit: ``dequantize_rows`` of ``quantize_rows``.

    The gradient is the straight-through estimate (Bengio et al. 2013, arXiv 1308.3432): that of the rows is that of the result. The
    largest number of a row sets its scale, so nothing is clipped.
    """
    return _Rows.apply(weight)  # type: ignore[no-any-return, no-untyped-call]


def fake_groups(weight: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    """Return the weight (out, in) as int4 would give it back, bit for bit: (q - point) * scale, q = round(weight / scale + point) in 0..15.

    Args:
        weight: (out, in), float32.
        scale: (out, groups), float32 that holds numbers of bfloat16.
        point: the same.

    The gradients are straight-through estimates, with x = weight / scale (LSQ, Esser et al. 2020, arXiv 1902.08153; with a point, LSQ+,
    Bhalgat et al. 2020, arXiv 2004.09576):

    - weight: that of the result, and nothing for a clipped weight;
    - scale: the sum over the group of it times (q - point - x), for a clipped weight times (q - point);
    - point: the sum over the clipped weights of the group of it times -scale.
    """
    return _Groups.apply(weight, scale, point)  # type: ignore[no-any-return, no-untyped-call]


def group_range(weight: Tensor, clip: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return scale and point (out, groups) in float32, rounded to bfloat16 with the gradient let through.

    The law: the range of a group goes from its least weight to its largest, less the shares ``clip`` (out, groups, 2) of that width at
    the lower and the upper end; a fifteenth of it is the scale, and point = -lower end / scale. So the range follows the weights as they
    train, and how much is clipped is learned (learnable weight clipping, Shao et al. 2023, arXiv 2308.13137). As in ``quantize_groups``, a
    group of next to no range has its value as scale, and point 0.
    """
    low, high = weight.detach().unflatten(1, (-1, group_size)).aminmax(dim=-1)
    width = high - low
    bottom = low + clip[..., 0] * width
    scale = (high - clip[..., 1] * width - bottom) / _LEVELS
    level = scale.abs() <= low.abs() * 2**-20
    scale = _through(torch.where(level, low, scale))
    point = _through(torch.where(level, 0, -bottom / torch.where(scale != 0, scale, 1)))
    return scale, point


class Fake(nn.Module):
    """What the layers have in common: ``compute_dtype``, that of the packed layer's results, follows a change of the model's dtype."""

    compute_dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class FakeLinear(Fake, nn.Linear):
    """A linear layer over a weight that is rounded at every forward: y = x W^T + b, in the dtype of x."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make another weight
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    @abstractmethod
    def fake_weight(self) -> Tensor:
        """Return the weight (out_features, in_features) as the packed layer would give it back, with gradients."""

    @abstractmethod
    def pack(self) -> nn.Linear:
        """Return the packed layer that this one stands for.

        Raises:
            TransformError: the weight holds NaN or infinity.
        """

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b for an input (..., in_features), in its dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.fake_weight().to(input.dtype), bias)


class FakeInt8Linear(FakeLinear):
    """Becomes ``Int8Linear``; the scales are found anew from the weight at every forward."""

    def fake_weight(self) -> Tensor:
        """Return the weight as int8 gives it back."""
        return fake_rows(self.weight.float())

    def pack(self) -> Int8Linear:
        """Return the packed layer."""
        sizes = (self.in_features, self.out_features)
        return Int8Linear(quantize_rows(self.weight.detach()), self.bias, sizes, self.compute_dtype).train(self.training)


class FakeInt4Linear(FakeLinear):
    """Becomes ``Int4Linear``. It trains the weight and ``clip`` (out, groups, 2), begun where the search of ``quantize_groups`` ends."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, compute_dtype: torch.dtype, group_size: int) -> None:
        super().__init__(weight, bias, compute_dtype)
        self.group_size = group_size
        self.clip = nn.Parameter(_searched_clip(weight.detach(), group_size))

    def fake_weight(self) -> Tensor:
        """Return the weight as int4 gives it back."""
        weight = self.weight.float()
        return fake_groups(weight, *group_range(weight, self.clip.float(), self.group_size))

    @torch.no_grad()
    def pack(self) -> Int4Linear:
        """Return the packed layer."""
        weight = self.weight.float()
        scale, point = group_range(weight, self.clip.float(), self.group_size)
        refuse_non_finite(scale + point)
        q = pack_nibbles(_numbers(weight, scale, point).to(torch.uint8).flatten(1))
        tensors = (q, scale.to(torch.bfloat16), point.to(torch.bfloat16))
        return Int4Linear(tensors, self.bias, self.group_size, self.compute_dtype).train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


class FakeInt8Embedding(Fake, nn.Embedding):
    """Becomes ``Int8Embedding``; only the rows that are looked up are rounded. It holds the weight that a tied head shares."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.compute_dtype = compute_dtype
        self.register_parameter("weight", weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) that whole numbers (...) name, in ``compute_dtype``."""
        rows = functional.embedding(input, self.weight, self.padding_idx)
        return fake_rows(rows.float().flatten(0, -2)).view(rows.shape).to(self.compute_dtype)

    def pack(self) -> Int8Embedding:
        """Return the packed embedding.

        Raises:
            TransformError: the weight holds NaN or infinity.
        """
        return Int8Embedding(quantize_rows(self.weight.detach()), self.padding_idx, self.compute_dtype).train(self.training)


def master(weight: Tensor) -> nn.Parameter:
    """Return the weight as a parameter to train, in float32 at least; a parameter that is that already comes back itself.

    Raises:
        TransformError: it has shapes only, or it is no float matrix.
    """
    if weight.is_meta:
        raise TransformError("a layer on the meta device has no weight to train; load the model first")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, nn.Parameter) and weight.dtype == wide:
        return weight
    return nn.Parameter(weight.detach().to(wide).contiguous(), requires_grad=True)


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        if weight.numel() == 0:  # nothing was looked up
            return weight.clone()
        scale = weight.abs().amax(dim=1) / 127
        step = torch.where(scale > 0, scale, 1)[:, None]
        return dequantize_rows(torch.round(weight / step).clamp_(-127, 127), scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Groups(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, point: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, point)
        return _numbers(weight, scale, point).sub_(point[..., None]).mul_(scale[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, scale, point = ctx.saved_tensors
        ratio = _divided(weight, scale)
        free = (ratio + point[..., None]).round_()
        inside = (free >= 0) & (free <= _LEVELS)
        grad = grads[0].view_as(ratio)
        passed = grad * inside
        to_scale = (grad * free.clamp_(0, _LEVELS).sub_(point[..., None])).sub_(passed * ratio).sum(dim=-1)
        to_point = -scale * (grad - passed).sum(dim=-1)
        return passed.flatten(1), to_scale, to_point


class _Through(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _through(value: Tensor) -> Tensor:
    """Round to bfloat16; the gradient passes as if nothing were rounded."""
    return _Through.apply(value)  # type: ignore[no-any-return, no-untyped-call]


def _divided(weight: Tensor, scale: Tensor) -> Tensor:
    """Return weight / scale as (out, groups, group_size)."""
    groups: Tensor = weight.unflatten(1, (scale.shape[1], -1))
    return groups / torch.where(scale != 0, scale, 1)[..., None]


def _numbers(weight: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    """Return the numbers 0..15 (out, groups, group_size) as floats: the arithmetic of ``quantize_groups``."""
    return _divided(weight, scale).add_(point[..., None]).round_().clamp_(0, _LEVELS)


def _searched_clip(weight: Tensor, group_size: int) -> Tensor:
    """Return what share of each group's width the search for the least squared error leaves out, at either end."""
    _, scale, point = quantize_groups(weight, group_size)
    low, high = weight.float().unflatten(1, (-1, group_size)).aminmax(dim=-1)
    width = high - low
    bottom = -point.float() * scale.float()
    top = bottom + _LEVELS * scale.float()
    level = width <= low.abs() * (_LEVELS * 2**-20)
    cut = torch.stack((bottom - low, high - top), dim=-1) / torch.where(level, 1, width)[..., None]
    return torch.where(level[..., None], 0, cut)
