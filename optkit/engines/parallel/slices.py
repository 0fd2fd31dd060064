"""Cuts a layer down to some of its outputs or inputs, in shape alone, and says which parts of its saved tensors those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.kernels.low_rank import LowRankLinear
from optkit.kernels.packed import PackedLayer

Axis = Literal["rows", "columns"]
Spans = Sequence[tuple[int, int]]
"""Parts of a dimension from a start to an end, in order."""


@dataclass(frozen=True)
class Slice:
    """What a process keeps of a saved tensor. ``silent``: it keeps the shape, with zeros: another process adds this one's values."""

    dim: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    silent: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy of the part, or zeros."""
        if self.silent:
            return torch.zeros_like(tensor)
        parts = [tensor.narrow(self.dim, start, end - start) for start, end in self.spans]
        return parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts, self.dim)


def cut_layer(layer: nn.Module, axis: Axis, spans: Spans, leads: bool) -> tuple[nn.Module, dict[str, Slice]]:
    """Return a layer with these rows or columns of the weight (out, in), its values still to be read, and the parts of the saved tensors.

    Args:
        layer: a linear layer, packed or not, or an embedding; used up.
        axis: which dimension of the weight is shared.
        spans: what is kept of it.
        leads: columns: whether this process adds the bias.

    Raises:
        TransformError: such a layer cannot be taken apart, or not there: a group would fall to two processes.
    """
    if isinstance(layer, LowRankLinear):
        return _cut_low_rank(layer, axis, spans, leads)
    if isinstance(layer, PackedLayer):
        return _cut_packed(layer, axis, spans, leads)
    if not (isinstance(layer, nn.Linear | nn.Embedding) or _is_conv1d(layer)) or "weight" not in layer._parameters:
        raise TransformError(f"a {type(layer).__name__} cannot be shared by several processes")
    return _cut_dense(layer, axis, spans, leads)


def length(spans: Spans) -> int:
    """Return the entries of all spans."""
    return sum(end - start for start, end in spans)


def _cut_dense(layer: Any, axis: Axis, spans: Spans, leads: bool) -> tuple[nn.Module, dict[str, Slice]]:
    flipped = _is_conv1d(layer)
    dim = int((axis == "columns") != flipped)
    found = {"weight": Slice(dim, tuple(spans))}
    _shorten(layer, "weight", dim, length(spans))
    if layer._parameters.get("bias") is not None:
        if axis == "rows":
            found["bias"] = Slice(0, tuple(spans))
            _shorten(layer, "bias", 0, length(spans))
        elif not leads:
            found["bias"] = Slice(silent=True)
    names = {"rows": ("out_features", "nf", "num_embeddings"), "columns": ("in_features", "nx", "embedding_dim")}[axis]
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, length(spans))
    return layer, found


def _is_conv1d(layer: nn.Module) -> bool:
    """Say whether it is transformers' linear layer with a transposed weight, without importing transformers for that."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _shorten(layer: nn.Module, name: str, dim: int, count: int) -> None:
    old = layer.get_parameter(name)
    shape = list(old.shape)
    shape[dim] = count
    layer._parameters[name] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad)


def _cut_packed(layer: Any, axis: Axis, spans: Spans, leads: bool) -> tuple[nn.Module, dict[str, Slice]]:
    units = layer.column_units()
    layout = layer.layout()
    names = {"rows": ("out_features", "num_embeddings"), "columns": ("in_features", "embedding_dim")}[axis]
    layout |= {name: length(spans) for name in names if name in layout}
    if axis == "rows":
        found = {name: Slice(0, tuple(spans)) for name in layer.portable if name != "input_scale"}
    else:
        found = {name: Slice(1, _units(spans, each)) for name, each in units.items()}
    if layout.get("bias"):
        if axis == "rows":
            found["bias"] = Slice(0, tuple(spans))
        elif not leads:
            found["bias"] = Slice(silent=True)
    return type(layer).empty(**layout), found


def _units(spans: Spans, each: int) -> tuple[tuple[int, int], ...]:
    broken = next((edge for span in spans for edge in span if edge % each), None)
    if broken is not None:
        raise TransformError(f"column {broken} is in the midst of a group of {each}, and groups are kept whole; use a smaller group_size")
    return tuple((start // each, end // each) for start, end in spans)


def _cut_low_rank(layer: LowRankLinear, axis: Axis, spans: Spans, leads: bool) -> tuple[nn.Module, dict[str, Slice]]:
    """Share the outputs of the second factor, or the inputs of the first; the other one is whole with everyone."""
    if axis == "rows":
        layer.up, found = cut_layer(layer.up, axis, spans, leads)
        layer.out_features = length(spans)
        return layer, {f"up.{name}": part for name, part in found.items()}
    layer.down, found = cut_layer(layer.down, axis, spans, leads)
    layer.in_features = length(spans)
    parts: Mapping[str, Slice] = {f"down.{name}": part for name, part in found.items()}
    silent = {} if leads or layer.bias is None else {"up.bias": Slice(silent=True)}
    return layer, {**parts, **silent}
