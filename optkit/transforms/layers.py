"""What transforms need to know about a model's layers: which hold weight matrices, which are tied, and which block list is the depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from optkit.core.errors import TransformError
from optkit.core.targets import matches

_KNOWN_HOLDERS = (nn.Linear, nn.Embedding, Conv1D, nn.LayerNorm, nn.RMSNorm)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that multiplies by a weight matrix: ``nn.Linear``, its kin, and transformers' ``Conv1D``, by dotted name.

    The output layer of ``nn.MultiheadAttention`` is none: that module reads its weight and never calls it.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and name and not _within_attention(module, name)
    }


def inner_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers with weights of their own, floats still, but for the output head and what is tied to an embedding."""
    head = output_head(module)
    return {
        name: layer
        for name, layer in linear_layers(module).items()
        if name != head and "weight" in layer._parameters and tied_embedding(module, layer) is None
    }


def _within_attention(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def output_head(module: nn.Module) -> str | None:
    """Return the name of the layer that makes logits, or None where the model has none."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, layer in module.named_modules() if layer is head), None) if head is not None else None


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight as (out_features, in_features), whichever way the layer stores it."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TransformError(f"{type(layer).__name__} has no weight tensor")
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


def tied_embedding(module: nn.Module, layer: nn.Module) -> str | None:
    """Return the name of the embedding that shares its weight with ``layer``, or None; the first where there are several."""
    return next(iter(tied_embeddings(module, layer)), None)


def tied_embeddings(module: nn.Module, layer: nn.Module) -> dict[str, nn.Embedding]:
    """Return all embeddings that share their weight with ``layer``: an encoder with a decoder may have three."""
    weight = layer._parameters.get("weight")
    embeddings = {name: other for name, other in module.named_modules() if isinstance(other, nn.Embedding)}
    return {name: other for name, other in embeddings.items() if weight is not None and other._parameters.get("weight") is weight}


def multiplier_of(embedding: nn.Embedding) -> float | None:
    """Return by what an embedding multiplies the rows that it looks up: 1 for a plain one, None where it computes something else.

    A scaled one has an ``embed_scale`` and is held to its answers; on the meta device, where it has none, its name must do.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(scale, int | float | Tensor) or (isinstance(scale, Tensor) and scale.numel() != 1):
        return None
    weight = embedding.weight.detach()
    if weight.is_meta:
        return float(getattr(embedding, "scalar_embed_scale", 1.0)) if isinstance(scale, Tensor) else float(scale)
    multiplier = float(scale.to(weight.dtype)) if isinstance(scale, Tensor) else float(scale)
    ids = torch.arange(min(4, embedding.num_embeddings), device=weight.device)
    with torch.no_grad():
        same = torch.allclose(embedding(ids), functional.embedding(ids, weight) * multiplier, rtol=1e-2)
    return multiplier if same else None


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the submodule called ``name``."""
    parent, _, attribute = name.rpartition(".")
    module.get_submodule(parent).register_module(attribute, layer)


def hidden_weights(module: nn.Module) -> dict[str, int]:
    """Return the layers that keep matrices outside linear layers, such as fused experts, with their number of weights.

    Kinds of layers that hold less than a hundredth of all parameters together are left out.
    """
    total = sum(parameter.numel() for parameter in module.parameters())
    sizes: dict[str, int] = {}
    kinds: Counter[type] = Counter()
    for name, layer in module.named_modules():
        size = sum(parameter.numel() for parameter in layer.parameters(recurse=False) if parameter.ndim >= 2)
        if size and not isinstance(layer, _KNOWN_HOLDERS):
            sizes[name] = size
            kinds[type(layer)] += size
    return {name: size for name, size in sizes.items() if kinds[type(module.get_submodule(name))] * 100 > total}


def refuse_hidden_weights(module: nn.Module, excluded: tuple[str, ...], doing: str, reached: Container[str] = ()) -> None:
    """Refuse a model that keeps matrices where a transform of linear layers would silently miss them.

    Args:
        module: the model.
        excluded: patterns of layers that shall stay as they are.
        doing: the transform's name, for the message.
        reached: layers that this transform can change though they are no linear ones.

    Raises:
        TransformError: names the layers, their share of all parameters, and the way to leave them as they are.
    """
    hidden = {name: size for name, size in hidden_weights(module).items() if name not in reached}
    missed = {name: size for name, size in hidden.items() if not any(matches(pattern, name) for pattern in excluded)}
    if missed:
        first, size = next(iter(missed.items()))
        share = sum(missed.values()) / sum(parameter.numel() for parameter in module.parameters())
        patterns = sorted({f"*.{name.rpartition('.')[2]}" if "." in name else name for name in missed})
        raise TransformError(
            f"{doing} cannot reach {len(missed)} layers that keep their weights outside linear layers ({share:.0%} of all parameters), "
            f"such as {first} ({type(module.get_submodule(first)).__name__}, {size:,} weights); "
            f"exclude them by name to leave them as they are: targets: {{exclude: {patterns}}}"
        )


def blocks(module: nn.Module, stack: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's repeated blocks, its depth; ``stack`` names one of several.

    Raises:
        TransformError: there is no list of at least two blocks of one class, or more than one such list is equally long and none
            is named.
    """
    lists = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.ModuleList) and len(layer) > 1 and len({type(block) for block in layer}) == 1
    }
    outer = {name: layer for name, layer in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise TransformError(f"{type(module).__name__} has no list of repeated blocks")
    if stack is not None:
        if stack not in outer:
            raise TransformError(f"stack {stack!r} is no list of repeated blocks; there are: {', '.join(outer)}")
        return stack, outer[stack]
    depth = max(len(layer) for layer in outer.values())
    longest = [name for name, layer in outer.items() if len(layer) == depth]
    if len(longest) > 1:
        raise TransformError(
            f"{type(module).__name__} has several lists of {depth} blocks: {', '.join(longest)}; name one: stack: {longest[0]}"
        )
    return longest[0], outer[longest[0]]


def is_on_meta(module: nn.Module) -> bool:
    """Say whether the module has shapes only."""
    return any(parameter.device == torch.device("meta") for parameter in module.parameters())
