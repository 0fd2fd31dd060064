"""Where a model keeps a width, found by comparing its shapes with those of a twin whose configuration names a smaller number.

No list of architectures is needed, and what is cut by such a map has the shapes that plain transformers builds from the new
configuration. What the shapes cannot tell, the layout of fused layers, stands here by name, and every cut is held to its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optkit.core.errors import TransformError

_FFN = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_FUSED_HEADS = ("qkv_proj", "Wqkv")  # all queries, then all keys, then all values


class Segment(NamedTuple):
    """Units that lie one after another: unit u takes ``each`` entries from ``start + u * each`` on."""

    start: int
    each: int


class Place(NamedTuple):
    """A dimension of a parameter that is as long as there are units: the rows of a weight (out, in) are 0, its columns 1."""

    layer: str
    parameter: str
    reads: bool  # whether the units are what the layer reads, not what it makes
    dim: int  # as the parameter is stored
    segments: tuple[Segment, ...]

    def entries(self, units: Tensor) -> Tensor:
        """Return the positions along the dimension that belong to these units, in order."""
        return torch.cat([(s.start + units[:, None] * s.each + torch.arange(s.each)).flatten() for s in self.segments])


class Width(NamedTuple):
    """A number of a configuration, and how it is written there."""

    units: int
    write: Callable[[Any, int], None]  # into a configuration, for so many units


def ffn_width(module: nn.Module) -> Width:
    """Return the width of the feed-forward layers.

    Raises:
        TransformError: the configuration has no one number for it.
    """
    config = _config(module)
    keys = [key for key in _FFN if hasattr(config, key)]
    found = {getattr(config, key) for key in keys if not isinstance(getattr(config, key), list)}
    units = next(iter(found), None) if len(found) == 1 else None
    if units is None and keys == ["n_inner"]:
        units = 4 * config.hidden_size  # as GPT-2 reads it
    if not isinstance(units, int):
        raise TransformError(f"the configuration of {type(module).__name__} has no one number for the width of its feed-forward layers")

    def write(config: Any, width: int) -> None:
        for key in keys:
            setattr(config, key, width)

    return Width(units, write)


def head_groups(module: nn.Module) -> Width:
    """Return the number of key-value groups: a head of keys and values, and all heads of queries that share it.

    Raises:
        TransformError: the configuration counts no heads.
    """
    config = _config(module)
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or isinstance(groups, list):
        raise TransformError(f"the configuration of {type(module).__name__} has no one number of attention heads")
    units = groups if isinstance(groups, int) else heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    def write(config: Any, kept: int) -> None:
        config.num_attention_heads = heads // units * kept
        if groups is not None:
            config.num_key_value_heads = kept
        config.head_dim = width

    return Width(units, write)


def encoder_heads(module: nn.Module, refuse: bool = True) -> tuple[Width, list[Place]]:
    """Return the heads of encoders of the BERT kind, whose layers count them by their own shapes: no configuration has to.

    Raises:
        TransformError: the model is built otherwise.
    """
    found, counts = [], set()
    for name, layer in module.named_modules():
        parts = [getattr(layer, part, None) for part in ("query", "key", "value")]
        size = getattr(layer, "attention_head_size", None)
        out_name = f"{name.rpartition('.')[0]}.output.dense"
        out = next((other for key, other in module.named_modules() if key == out_name), None)
        if not isinstance(size, int) or not all(type(part) is nn.Linear for part in parts) or type(out) is not nn.Linear:
            continue
        counts.add(out.in_features // size)
        for part in ("query", "key", "value"):
            parameters = dict(layer.get_submodule(part).named_parameters())
            found += [Place(f"{name}.{part}", parameter, False, 0, (Segment(0, size),)) for parameter in parameters]
        found.append(Place(out_name, "weight", True, 1, (Segment(0, size),)))
    if refuse and len(counts) != 1:
        raise TransformError(f"{type(module).__name__} is built otherwise than encoders of the BERT kind, or has heads of several numbers")
    return Width(next(iter(counts), 0), lambda config, kept: None), found


def hidden_width(module: nn.Module) -> Width:
    """Return the width of the residual stream. Heads stay as they are.

    Raises:
        TransformError: the configuration has no one number for it.
    """
    config = _config(module)
    units, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(units, int) or not isinstance(heads, int):
        raise TransformError(f"the configuration of {type(module).__name__} has no one number for the width of its hidden states")
    width = getattr(config, "head_dim", None) or units // heads

    def write(config: Any, kept: int) -> None:
        config.hidden_size = kept
        config.head_dim = width

    return Width(units, write)


def places_of(module: nn.Module, width: Width, what: str) -> list[Place]:
    """Return everything in the model that has this width.

    Raises:
        TransformError: the shapes of the model do not follow from the number, or something that is no linear layer has it.
    """
    kept = width.units // 2 if width.units % 2 == 0 else width.units - 1
    twin, own = twin_of(module, lambda config: width.write(config, kept)), dict(module.named_parameters())
    changed = {name: other.shape for name, other in twin.named_parameters() if name in own and (own[name].shape != other.shape)}
    if not changed:
        raise TransformError(
            f"{type(module).__name__} cannot have fewer {what}: its configuration has no number for that; prune another width"
        )
    return [_place(module, name, shape, width.units, kept, what) for name, shape in changed.items()]


def twin_of(module: nn.Module, write: Callable[[Any], None]) -> nn.Module:
    """Return a model on the meta device as another configuration describes it.

    Raises:
        TransformError: transformers cannot build it.
    """
    config = deepcopy(_config(module))
    write(config)
    try:
        with torch.device("meta"):
            twin: nn.Module = type(module)._from_config(config)  # type: ignore[attr-defined]
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise TransformError(f"transformers builds no {type(module).__name__} of that size: {error}") from None
    return twin


@torch.no_grad()
def cut(module: nn.Module, write: Callable[[Any], None] | None, kept: Mapping[Place, Tensor]) -> None:
    """Keep these units of every place, in order, and make the module and its configuration say so.

    Without ``write`` there is no configuration that could: only the layers themselves tell their sizes then.
    """
    for place, units in kept.items():
        layer = module.get_submodule(place.layer)
        old = layer.get_parameter(place.parameter)
        new = old.detach().index_select(place.dim, place.entries(units).to(old.device)).contiguous()
        shorter = nn.Parameter(new, requires_grad=old.requires_grad)
        for owner in module.modules():  # a tied weight has several
            for key, parameter in owner._parameters.items():
                if parameter is old:
                    owner._parameters[key] = shorter
    if write is None:
        for place in kept:
            _tell_sizes(module.get_submodule(place.layer))
        return
    twin = twin_of(module, write)
    write(_config(module))
    for name, layer in module.named_modules():
        for key, value in vars(twin.get_submodule(name)).items():
            if type(value) is int and type(vars(layer).get(key)) is int:
                setattr(layer, key, value)


def _tell_sizes(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape


@torch.no_grad()
def silence(module: nn.Module, place: Place, units: Tensor) -> None:
    """Set what belongs to these units to zero, so that the model answers as it will when they are cut out."""
    parameter = module.get_submodule(place.layer).get_parameter(place.parameter)
    parameter.index_fill_(place.dim, place.entries(units).to(parameter.device), 0)


def _place(module: nn.Module, name: str, shape: torch.Size, units: int, kept: int, what: str) -> Place:
    layer_name, _, parameter = name.rpartition(".")
    layer = module.get_submodule(layer_name)
    before = layer.get_parameter(parameter).shape
    dims = [dim for dim, (old, new) in enumerate(zip(before, shape, strict=True)) if old != new]
    lost = [before[dim] - shape[dim] for dim in dims]
    if len(dims) != 1 or lost[0] % (units - kept) or before[dims[0]] != lost[0] // (units - kept) * units:
        raise TransformError(f"{name} is {tuple(before)}, which does not follow from {units} {what}; prune another width")
    each = lost[0] // (units - kept)
    flipped = isinstance(layer, Conv1D) and parameter == "weight"
    reads = isinstance(layer, nn.Linear | Conv1D) and len(before) != before.numel() and (dims[0] == 1) != flipped
    return Place(layer_name, parameter, reads, dims[0], _segments(module, layer_name, units, each, what))


def _segments(module: nn.Module, layer: str, units: int, each: int, what: str) -> tuple[Segment, ...]:
    last = layer.rpartition(".")[2]
    config = _config(module)
    if what == HEADS and last in _FUSED_HEADS:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads * width
        together = config.num_attention_heads // units * width
        return Segment(0, together), Segment(queries, width), Segment(queries + units * width, width)
    if what == FFN and each > 1:
        return tuple(Segment(part * units, 1) for part in range(each))  # gate and up in one layer, one after the other
    return (Segment(0, each),)


HEADS, FFN, HIDDEN = "groups of heads", "feed-forward units", "hidden units"


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if config is None or not type(module).__module__.startswith("transformers."):
        raise TransformError(f"{type(module).__name__} is no model of transformers, whose configuration would tell its widths")
    return config
