"""Tensor parallelism: every process has some heads, some feed-forward units and some of the vocabulary, and sums are taken with its peers.

Layers keep their kinds, so that engines and later reports find what they know; what passes between processes hangs on them as hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.group import share_of
from optkit.engines.parallel.part import Part
from optkit.engines.parallel.plan import biased_by_head, head_counts, shared_layers, shares_heads, tell_fewer_heads
from optkit.engines.parallel.slices import Slice, Spans, cut_layer
from optkit.kernels.int8 import Int8Embedding, Int8Linear


def cut_to_shard(module: Any, part: Part) -> dict[str, Slice]:
    """Cut a model down to one shard, in shape alone, hang the sums on it, and return what is kept of each saved tensor that is shared.

    Raises:
        TransformError: sizes do not divide, or a layer cannot be shared; the message has the numbers.
    """
    size, index = part.mesh.tensor, part.place.tensor
    shared = shared_layers(module)
    if shares_heads(shared):
        heads, groups = head_counts(module)
        if groups % size:
            what = f"{groups} groups of heads" if groups != heads else f"{heads} heads"
            raise TransformError(f"{what} cannot be shared evenly by {size} processes; {_sizes(groups)}")
    found: dict[str, Slice] = {}
    for name, one in shared.items():
        layer: Any = module.get_submodule(name)
        axis = "rows" if one.how.startswith("colwise") else "columns"
        width = _width(layer, axis)
        if width % (one.segments * size):
            raise TransformError(f"the {width} {_called(axis)} of {name} cannot be shared evenly by {size} processes")
        each = width // one.segments
        spans = tuple((start + each // size * index, start + each // size * (index + 1)) for start in range(0, width, each))
        layer = _put(module, name, axis, spans, index == 0, found)
        if one.how == "colwise_gather_output":
            layer.register_forward_hook(_gathering(part, width, spans[0][0]))
        if one.how == "rowwise_split_input":
            layer.register_forward_pre_hook(_splitting(spans[0]))
        if axis == "columns":
            layer.register_forward_hook(_summing(part))
    tell_fewer_heads(module, shared, size)
    for attention in biased_by_head(module):
        attention.register_forward_pre_hook(_own_bias(size, index), with_kwargs=True)
    _cut_vocabulary(module, part, found)
    return found


def _cut_vocabulary(module: Any, part: Part, found: dict[str, Slice]) -> None:
    """Share the rows of the embedding and of the head, where this stage has them; uneven shares do no harm there. Tied ones stay tied."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    names = {id(layer): name for name, layer in module.named_modules()}
    tied = is_tied(embedding, head)
    if isinstance(embedding, nn.Embedding):
        own = share_of(embedding.num_embeddings, part.mesh.tensor, part.place.tensor)
        padding, embedding.padding_idx = embedding.padding_idx, None
        fresh: Any = _put(module, names[id(embedding)], "rows", ((own.start, own.stop),), True, found)
        fresh.padding_idx = padding - own.start if padding is not None and own.start <= padding < own.stop else None
        look_up = _LookUp(part, own)
        fresh.register_forward_pre_hook(look_up.before)
        fresh.register_forward_hook(look_up.after)
    if isinstance(head, nn.Linear):
        total, name = head.out_features, names[id(head)]
        own = share_of(total, part.mesh.tensor, part.place.tensor)
        part.vocabulary = total
        span = ((own.start, own.stop),)
        head = _tie(module, name, fresh, own, found) if tied else _put(module, name, "rows", span, True, found)
        head.register_forward_hook(_gathering(part, total, own.start))


def _tie(module: nn.Module, name: str, embedding: Any, own: slice, found: dict[str, Slice]) -> nn.Module:
    """Tie the head to the share of the embedding, and return it."""
    head: Any = module.get_submodule(name)
    made: nn.Module = head
    bias = head._parameters.get("bias")
    if bias is not None:
        found[f"{name}.bias"] = Slice(0, ((own.start, own.stop),))
        bias = torch.empty(own.stop - own.start, dtype=bias.dtype, device=bias.device)
    if isinstance(embedding, Int8Embedding):
        parent, _, attribute = name.rpartition(".")
        made = Int8Linear.tied_to(embedding, bias)
        module.get_submodule(parent).register_module(attribute, made)
        return made
    head.weight, head.out_features = embedding.weight, own.stop - own.start
    head.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def is_tied(embedding: Any, head: Any) -> bool:
    """Say whether an output head has its weight from the embedding."""
    if head is None or not isinstance(embedding, nn.Embedding):
        return False
    return getattr(head, "tied", None) is embedding or head._parameters.get("weight", 0) is embedding._parameters.get("weight", 1)


def _put(module: nn.Module, name: str, axis: Any, spans: Spans, leads: bool, found: dict[str, Slice]) -> nn.Module:
    try:
        fresh, slices = cut_layer(module.get_submodule(name), axis, spans, leads)
    except TransformError as error:
        raise TransformError(f"{name}: {error}") from None
    parent, _, attribute = name.rpartition(".")
    module.get_submodule(parent).register_module(attribute, fresh)
    found.update({f"{name}.{tensor}": part for tensor, part in slices.items()})
    return fresh


def _width(layer: Any, axis: str) -> int:
    if hasattr(layer, "nf"):
        return int(layer.nf if axis == "rows" else layer.nx)
    return int(layer.out_features if axis == "rows" else layer.in_features)


def _called(axis: str) -> str:
    return "outputs" if axis == "rows" else "inputs"


def _sizes(count: int) -> str:
    able = [size for size in range(2, count + 1) if count % size == 0]
    return f"use size {' or '.join(map(str, able[:4]))}" if able else "there is only one, so use pipeline_parallel"


def _summing(part: Part) -> Callable[..., Tensor]:
    return lambda layer, inputs, output: part.sum(output)


def _gathering(part: Part, total: int, start: int) -> Callable[..., Tensor]:
    return lambda layer, inputs, output: part.gather(output, total, start)


def _splitting(span: tuple[int, int]) -> Callable[..., tuple[Tensor]]:
    return lambda layer, inputs: (inputs[0][..., span[0] : span[1]],)


class _LookUp:
    """The hooks of a shared embedding: rows are looked up by the process that has them, and summed with the zeros of the others."""

    def __init__(self, part: Part, own: slice) -> None:
        self._part, self._own = part, own
        self._elsewhere = torch.empty(0, dtype=torch.bool)

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        ids = inputs[0] - self._own.start
        self._elsewhere = (ids < 0) | (ids >= self._own.stop - self._own.start)
        return (ids.masked_fill(self._elsewhere, 0),)

    def after(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._part.sum(output.masked_fill(self._elsewhere[..., None], 0))


def _own_bias(size: int, index: int) -> Callable[..., Any]:
    def hook(layer: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        alibi = named["alibi"]  # (batch * heads, 1, positions)
        heads = layer.num_heads * size  # type: ignore[operator]
        own = alibi.unflatten(0, (-1, heads))[:, layer.num_heads * index : layer.num_heads * (index + 1)]  # type: ignore[operator]
        return inputs, named | {"alibi": own.flatten(0, 1)}

    return hook
