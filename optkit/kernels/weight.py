"""The weight of a packed layer as a tensor: sizes and dtype are at hand, values are dequantized when an operation asks for them.

Models read ``layer.weight.dtype`` (T5 does so at every step), and ``nn.TransformerEncoderLayer`` hands weights to a fused operator of its
own where it finds plain tensors. This one is not plain, so the encoder layer calls its linear layers, and with them the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from optkit.kernels.packed import PackedLinear

_WITHOUT_VALUES = {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_meta", "is_cpu", "is_cuda", "is_sparse"}
_WITHOUT_VALUES_TOO = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}


class PackedWeight(Tensor):
    """Stands for a weight (out_features, in_features). What is computed from it is a plain tensor."""

    layer: PackedLinear

    @staticmethod
    def __new__(cls: type[PackedWeight], layer: PackedLinear) -> PackedWeight:  # noqa: D102 - PyTorch makes such tensors here
        held = next((buffer for buffer in layer.owner.buffers() if buffer is not None), None)
        weight = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=None if held is None else held.device
        )
        weight.layer = layer
        found: PackedWeight = weight
        return found

    def dense(self) -> Tensor:
        """Return the values."""
        return self.layer.dequantize(self.layer.compute_dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what needs no values, and do everything else with the values."""
        told = getattr(getattr(func, "__self__", None), "__name__", "") if getattr(func, "__name__", "") == "__get__" else ""
        if told in _WITHOUT_VALUES or func in _WITHOUT_VALUES_TOO:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_dense(args), **_dense(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Serve operators that are called past the above."""
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(value: Any) -> Any:
    return tree_map_only(PackedWeight, PackedWeight.dense, value)
