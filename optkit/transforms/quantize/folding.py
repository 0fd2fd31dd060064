"""Where a scale can move from the outputs of one layer into the weights of the next ones without changing the model's answers.

Candidates are found by following tensors through one forward pass, with no list of architectures: a norm whose output linear layers
read, or a linear layer whose outputs reach another one. Each candidate is then tried with powers of two, which round nothing: it is
kept only where the answers stay, and would not have stayed had the scale been in the producer alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.transforms.layers import blocks, weight_of
from optkit.transforms.tracing import Trace, answer_of, evaluating, some_tokens

_TRIED = 4  # linear layers before a consumer that are tried as its producer, the nearest first
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest answer; for 16 bits:
_HALF_TOLERANCE = 0.02


class Fold(NamedTuple):
    """A producer, and all that reads its outputs: ``rows`` (in_features,) names the output of the producer behind each of their columns.

    Several columns have one row where heads share their values.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: Tensor


def folds(module: nn.Module, batch: Mapping[str, Tensor] | None = None) -> list[Fold]:
    """Return the folds within the model's blocks, or within the whole module where it has none, in the order of execution.

    Args:
        module: changed by nothing; layers that are packed, tied, or run more than once are left out.
        batch: keyword inputs of one small forward pass; None for a language model: some token ids.

    Raises:
        TransformError: there is no batch, and the module is no language model; or its answers are not finite.
    """
    batch = some_tokens(module) if batch is None else batch
    with evaluating(module):
        trace = Trace(module, batch)
        if not bool(torch.isfinite(trace.answer).all()):
            raise TransformError(f"{type(module).__name__} answers with NaN or infinity, so that nothing can be tried on it")
        found = []
        for group, prefixes in _groups(module, trace):
            for producer, rows in _options(module, trace, prefixes[0], group):
                tried = [Fold(prefix + producer, tuple(prefix + name for name in group), rows) for prefix in prefixes]
                if all(_fits(module, fold) for fold in tried) and _holds(module, batch, trace.answer, tried):
                    found += tried
                    break
    return sorted(found, key=lambda fold: trace.order[fold.consumers[0]])


def shared(fold: Fold, scale: Tensor) -> Tensor:
    """Return a scale (in_features,) made equal, by the mean, for the columns that have one row of the producer."""
    size = int(fold.rows.max()) + 1
    sums = torch.zeros(size, dtype=scale.dtype).index_add_(0, fold.rows, scale)
    return (sums / torch.bincount(fold.rows, minlength=size).clamp(min=1))[fold.rows]


@torch.no_grad()
def apply_fold(module: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the producer's outputs by a positive scale (in_features,) and multiply the consumers' columns by it, in place.

    Raises:
        TransformError: the scale is not positive and finite, or differs between columns of one row; see ``shared``.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise TransformError(f"a scale for {fold.producer} is not positive and finite")
    producer = module.get_submodule(fold.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    outputs = weight.numel() if weight.ndim == 1 else weight_of(producer).shape[0]
    by_row = torch.ones(outputs, dtype=torch.float32).index_copy_(0, fold.rows, scale.float())
    if not torch.equal(by_row[fold.rows], scale.float()):
        raise TransformError(f"the scale for {fold.producer} differs between columns that share an output of it")
    if weight.ndim == 1:
        offset = _offset(producer) or 0.0
        weight.copy_((weight.float() + offset) / by_row - offset)
    else:
        weight_of(producer).copy_(weight_of(producer).float() / by_row[:, None])
    bias = producer._parameters.get("bias")
    if bias is not None:
        bias.copy_(bias.float() / by_row)
    for name in fold.consumers:
        matrix = weight_of(module.get_submodule(name))
        matrix.copy_(matrix.float() * scale.float())


def _groups(module: nn.Module, trace: Trace) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield linear layers that read one tensor, by their names within a block, and the blocks that have such a group."""
    found: dict[tuple[str, ...], list[str]] = {}
    for prefix in _prefixes(module):
        inside = [name for name in trace.linears if name.startswith(prefix)]
        while inside:
            group = [name for name in inside if trace.same(trace.inputs[name], trace.inputs[inside[0]])]
            found.setdefault(tuple(name.removeprefix(prefix) for name in group), []).append(prefix)
            inside = [name for name in inside if name not in group]
    yield from found.items()


def _options(module: nn.Module, trace: Trace, prefix: str, group: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield what may feed a group, by its name within the block, with the row of each column."""
    read, width = trace.inputs[prefix + group[0]], trace.inputs[prefix + group[0]].shape[-1]
    for norm in trace.norms:
        if norm.startswith(prefix) and trace.same(trace.outputs[norm], read):
            yield norm.removeprefix(prefix), torch.arange(width)
    place = trace.order[prefix + group[0]]
    before = [name for name in trace.linears if name.startswith(prefix) and trace.order[name] < place]
    for name in before[::-1][:_TRIED]:
        for rows in _row_maps(trace.outputs[name].shape[-1], width, _head_size(module)):
            yield name.removeprefix(prefix), rows


def _row_maps(outputs: int, width: int, head: int | None) -> Iterator[Tensor]:
    """Yield ways in which ``width`` columns can be outputs of a layer: all of them, one half, the values of fused or shared heads."""
    columns = torch.arange(width)
    if outputs == width:
        yield columns
    if outputs == 2 * width:
        yield columns + width
        yield columns
    if head is None or width % head:
        return
    values = outputs if outputs < width else (outputs - width) // 2  # as many as the keys, of fused queries, keys and values
    if outputs != width and values > 0 and values % head == 0 and width % values == 0:
        yield outputs - values + columns // head // (width // values) * head + columns % head
    if outputs == 3 * width:  # query, key and value of a head side by side
        yield columns // head * 3 * head + 2 * head + columns % head


def _holds(module: nn.Module, batch: Mapping[str, Tensor], answer: Tensor, tried: list[Fold]) -> bool:
    """Say whether scales in producers and consumers leave the answer as it is, and scales in the producers alone would not."""
    limit = _TOLERANCE.get(answer.dtype, _HALF_TOLERANCE) * float(answer.float().abs().max())
    both, alone = (float((_scaled(module, batch, tried, consumers) - answer.float()).abs().max()) for consumers in (True, False))
    return both <= limit < alone


def _scaled(module: nn.Module, batch: Mapping[str, Tensor], tried: list[Fold], consumers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for fold in tried:
            size = int(fold.rows.max()) + 1
            powers = 2.0 ** torch.randint(-1, 2, (size,), generator=generator)
            powers[torch.bincount(fold.rows, minlength=size) == 0] = 1

            def divide(_: nn.Module, __: Any, output: Tensor, powers: Tensor = powers) -> Tensor:
                whole = torch.ones(output.shape[-1]).index_copy_(0, torch.arange(len(powers)), powers)
                return output / whole.to(output)

            def multiply(_: nn.Module, args: tuple[Tensor, ...], scale: Tensor = powers[fold.rows]) -> tuple[Tensor, ...]:
                return (args[0] * scale.to(args[0]), *args[1:])

            stack.callback(module.get_submodule(fold.producer).register_forward_hook(divide).remove)
            for name in fold.consumers if consumers else ():
                stack.callback(module.get_submodule(name).register_forward_pre_hook(multiply).remove)
        return answer_of(module, batch).float()


def _fits(module: nn.Module, fold: Fold) -> bool:
    names = dict(module.named_modules())
    if fold.producer not in names or any(name not in names for name in fold.consumers):
        return False
    producer = names[fold.producer]
    if isinstance(producer.weight, Tensor) and producer.weight.ndim == 1:
        return producer.weight.numel() == len(fold.rows) and _offset(producer) is not None
    return int(fold.rows.max()) < weight_of(producer).shape[0]


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    """Return 0 where a norm multiplies by its weight, 1 where by 1 + weight, None where it does something else."""
    probe = copy.deepcopy(norm)
    assert isinstance(probe.weight, Tensor)
    x = torch.linspace(-2, 3, probe.weight.numel()).to(probe.weight)[None]
    bias = probe._parameters.get("bias")
    for offset in (0.0, 1.0):
        probe.weight.fill_(-offset)
        if torch.equal(probe(x)[0], torch.zeros_like(x[0]) if bias is None else bias):
            return offset
    return None


def _prefixes(module: nn.Module) -> list[str]:
    try:
        name, found = blocks(module)
    except TransformError:
        return [""]
    return [f"{name}.{index}." for index in range(len(found))]


def _head_size(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)
