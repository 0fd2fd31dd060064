"""What all packed layers share: a portable layout that is saved, a kernel layout that runs, and never both in memory for long.

The kernel layout is made at the first forward on the CPU. Moving, saving or loading a layer goes through the portable one.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.kernels.native import LayerStruct, Native, native
from optkit.kernels.ops import HALF, has_native_operator, multiply, packed_linear, struct_of
from optkit.kernels.weight import PackedWeight

_PACKING = threading.Lock()
_traced_natively = False  # read while tracing, when nothing can be compiled any more


class Operands(NamedTuple):
    """What a kernel reads beside the weight itself, and how it reads the weight; see ``struct_at``."""

    scale: Tensor | None = None
    input_scale: Tensor | None = None
    group: int = 0
    float16: bool = False
    integer: bool = False


class Plan(NamedTuple):
    """What a call of the kernels needs, ready at hand. It keeps the tensors alive whose addresses it holds."""

    native: Native
    address: int
    struct: LayerStruct
    tensors: tuple[Tensor, ...]


class PackedLayer(nn.Module):
    """A layer whose weight is integers with scales. Its ``state_dict`` is the same on every backend."""

    portable: ClassVar[tuple[str, ...]]  # the saved buffers, in the order of quantize_*
    replaced: ClassVar[tuple[str, ...]]  # those of them that the kernel layout takes the place of

    compute_dtype: torch.dtype
    kernel: Tensor | None

    def __init__(self, tensors: tuple[Tensor, ...], compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a float weight
        self.compute_dtype = compute_dtype
        self.plan: Plan | None = None
        for name, tensor in zip(self.portable, tensors, strict=bool(tensors)):
            self.register_buffer(name, tensor)
        self.register_buffer("kernel", None, persistent=False)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as floats of this dtype."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty`` that make a layer of this shape, as JSON."""

    def column_units(self) -> dict[str, int]:
        """Return by saved tensor how many columns of the weight an entry of its last dimension stands for; the others are not by column.

        Raises:
            TransformError: a layer of this kind cannot be taken apart.
        """
        raise TransformError(f"a {type(self).__name__} cannot be shared by several processes; int8 and int4 can")

    @abstractmethod
    def _to_kernel(self) -> Tensor: ...

    @abstractmethod
    def _from_kernel(self, kernel: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def _operands(self) -> Operands: ...

    @abstractmethod
    def _sizes(self) -> tuple[int, int]: ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors in the portable layout, whichever layout is in memory."""
        fresh = dict(zip(self.replaced, self._from_kernel(self.kernel), strict=True)) if self.kernel is not None else {}
        return tuple(fresh.get(name, self._buffers[name]) for name in self.portable)  # type: ignore[misc]

    def prepare(self) -> bool:
        """Make the kernel layout now, in place of the portable one; return False where no kernel can run: no backend, or not on the CPU."""
        if self.plan is not None:
            return True
        held = [tensor for tensor in self._buffers.values() if tensor is not None][-1]
        found = native() if held.device.type == "cpu" else None
        if found is None:
            if self.kernel is not None:
                self.restore()
            return False
        with _PACKING:
            if self.kernel is None:
                self.kernel = self._to_kernel()
                for name in self.replaced:
                    self._buffers[name] = None
            rows, cols = self._sizes()
            struct, address = struct_of(self.kernel, rows, cols, *self._operands())
            self.plan = Plan(found, address, struct, tuple(tensor for tensor in self._buffers.values() if tensor is not None))
        return True

    def prepare_on_cuda(self) -> None:
        """Make a layout for CUDA, where there is one beside the portable one and the layer is there."""

    def restore(self) -> None:
        """Go back to the portable layout, in place of the kernel one."""
        with _PACKING:
            self.plan = None
            if self.kernel is not None:
                self._buffers.update(zip(self.replaced, self._from_kernel(self.kernel), strict=True))
                self.kernel = None

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return ", ".join(f"{name}={value}" for name, value in self.layout().items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but keep the dtype of the packed tensors: a change of dtype is for the bias and the results."""
        self.restore()
        before = {name: self._buffers[name] for name in self.portable if name in self._buffers}
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination.update((prefix + name, tensor) for name, tensor in zip(self.portable, self.tensors(), strict=True))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.restore()
        errors: list[str] = rest[-1]
        for name in self.portable:
            old, new = self._buffers.get(name), state_dict.get(prefix + name)
            if old is not None and isinstance(new, Tensor) and old.dtype != new.dtype:
                errors.append(f"{prefix}{name} is {new.dtype}, expected {old.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer over packed weights: y = x W^T + b, in the dtype of x.

    On the CPU, float32 and bfloat16 inputs that need no gradient run in the kernels; all else dequantizes and multiplies in PyTorch.
    """

    def __init__(self, tensors: tuple[Tensor, ...], bias: Tensor | None, sizes: tuple[int, int], compute_dtype: torch.dtype) -> None:
        super().__init__(tensors, compute_dtype)
        self.in_features, self.out_features = sizes
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
        self._owner: tuple[PackedLayer, ...] = ()  # in a tuple, so that a tied embedding is no child of this module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out_features, in_features) in ``compute_dtype``, dequantized when its values are asked for; it cannot be set."""
        return self.dequantize(self.compute_dtype) if is_compiling() else PackedWeight(self)

    @property
    def owner(self) -> PackedLayer:
        """The layer that holds the packed weight: this one, or the embedding it is tied to."""
        return self._owner[0] if self._owner else self

    @property
    def tied(self) -> PackedLayer | None:
        """The embedding whose weight this layer shares; None where it has its own."""
        return self._owner[0] if self._owner else None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors in the portable layout; those of the embedding where this layer is tied."""
        return self._owner[0].tensors() if self._owner else super().tensors()

    def in_kernels(self, input: Tensor) -> bool:
        """Say whether the kernels take inputs like this one; their layout is made where it is not there yet."""
        return is_compiling() or (is_plain(input) and self.owner.prepare())

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b for an input (..., in_features), in its dtype.

        Raises:
            RuntimeError: the input has another number of features.
        """
        if is_compiling():
            return self._forward_traced(input)
        plan = (self._owner[0] if self._owner else self).plan
        bias = self._parameters["bias"]
        if plan is None or not is_plain(input) or (bias is not None and bias.dtype not in HALF):
            return self._forward_elsewhere(input)
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"the input has {input.shape[-1]} features, this layer takes {self.in_features}")
        return multiply(plan.native, plan.address, input, bias, self.out_features)

    def _sizes(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _forward_elsewhere(self, input: Tensor) -> Tensor:
        if self.owner.plan is None and is_plain(input) and self.owner.prepare():
            return self.forward(input)
        return self._forward_torch(input)

    def _forward_traced(self, input: Tensor) -> Tensor:
        kernel = self.owner.kernel
        if kernel is None or input.dtype not in HALF or input.device.type != "cpu" or (torch.is_grad_enabled() and input.requires_grad):
            return self._forward_torch(input)
        operator = torch.ops.optkit.packed_linear_native if _traced_natively else packed_linear
        bias = self.bias if self.bias is None or self.bias.dtype in HALF else self.bias.float()
        output: Tensor = operator(input, kernel, bias, *self._sizes(), *self.owner._operands())
        return output

    def _forward_torch(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.dequantize(input.dtype), bias)


def prepare_layers(module: nn.Module) -> int:
    """Make the kernel layout of every packed layer in a module, as compiled models need before tracing; return how many layers have one."""
    global _traced_natively
    layers = [layer.owner for layer in module.modules() if isinstance(layer, PackedLinear)]
    count = sum(layer.prepare() for layer in layers)
    _traced_natively = count > 0 and has_native_operator()
    for layer in layers:
        layer.prepare_on_cuda()
    return count


def is_plain(input: Tensor) -> bool:
    """Say whether the kernels may read this tensor: floats in the memory of the CPU, and nobody asks for a gradient or a trace."""
    return (
        (type(input) is Tensor or type(input) is nn.Parameter)
        and input.dtype in HALF
        and input.is_cpu
        and not (input.requires_grad and torch.is_grad_enabled())
        and torch._C._get_tracing_state() is None
    )
