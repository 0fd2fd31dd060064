"""Replaces linear layers by packed ones, head and embedding included. Which number format is packed is the caller's business."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.targets import Targets
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.transforms.layers import (
    hidden_weights,
    linear_layers,
    output_head,
    refuse_hidden_weights,
    replace_layer,
    tied_embedding,
    weight_of,
)

Pack = Callable[[Tensor, Tensor | None], nn.Linear]


def packer(kind: type[Int4Linear] | type[Int8Linear], **settings: Any) -> Pack:
    """Return what packs a weight (out, in) and its bias; on the meta device it makes the shapes alone, without the search for scales."""

    def pack(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        if not weight.is_meta:
            return kind.from_weight(weight, bias, **settings)
        with weight.device:
            dtype = str(weight.dtype).removeprefix("torch.")
            return kind.empty(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, **settings)

    return pack


def pack_layers(module: nn.Module, targets: Targets, pack: Pack, pack_head: Pack) -> nn.Module:
    """Replace the selected linear layers in place and return the module.

    Layers that are packed already are left alone. A head that shares its weight with the embedding is packed in int8 together
    with it, so that the two stay tied.
    """
    if isinstance(module, nn.Linear):
        return pack(module.weight.detach(), bias_of(module))
    return pack_named(module, targets.select(candidates(module), hidden_weights(module)), pack, pack_head)


def pack_named(module: nn.Module, names: Iterable[str], pack: Pack, pack_head: Pack) -> nn.Module:
    """Replace the linear layers of these names in place and return the module; see ``pack_layers``."""
    head = output_head(module)
    for name in names:
        layer = module.get_submodule(name)
        embedding = tied_embedding(module, layer)
        try:
            if embedding is not None:
                _pack_tied(module, embedding, name, layer)
            else:
                replace_layer(module, name, (pack_head if name == head else pack)(weight_of(layer), bias_of(layer)))
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
    return module


def candidates(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that are not packed yet."""
    return {name: layer for name, layer in linear_layers(module).items() if "weight" in layer._parameters}


def selected(module: nn.Module, targets: Targets, doing: str) -> dict[str, nn.Module]:
    """Return the layers that packing would change, after refusing models whose weights would be missed.

    Raises:
        TransformError: matrices stand outside linear layers, or an embedding that computes more than a look-up shares its weight.
        TargetError: a pattern matches nothing.
    """
    refuse_hidden_weights(module, targets.exclude, doing)
    layers = candidates(module)
    chosen = {name: layers[name] for name in targets.select(layers, hidden_weights(module))}
    for name, layer in chosen.items():
        embedding = tied_embedding(module, layer)
        kind = type(module.get_submodule(embedding)) if embedding is not None else nn.Embedding
        if kind.forward is not nn.Embedding.forward:
            raise TransformError(
                f"{doing} cannot pack {name}: it shares its weight with {embedding}, and {kind.__name__} computes more than a look-up; "
                f"leave both as they are: targets: {{exclude: ['{name}']}}"
            )
    return chosen


def _pack_tied(module: nn.Module, embedding_name: str, head_name: str, head: nn.Module) -> None:
    embedding = module.get_submodule(embedding_name)
    assert isinstance(embedding, nn.Embedding)
    packed = Int8Embedding.from_embedding(embedding)
    tied = Int8Linear.tied_to(packed, bias_of(head))
    replace_layer(module, embedding_name, packed)
    replace_layer(module, head_name, tied)


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias of a layer, or None."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None
