"""Replaces linear and recurrent layers by packed ones, head and embedding included. The number format is the caller's business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.targets import Targets
from optkit.kernels.gru import Int8GRU
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.lstm import Int8LSTM
from optkit.kernels.recurrent import PackedRecurrent, refuse_recurrent
from optkit.transforms.layers import (
    hidden_weights,
    linear_layers,
    multiplier_of,
    output_head,
    refuse_hidden_weights,
    replace_layer,
    tied_embeddings,
    weight_of,
)

RECURRENT: Mapping[type[nn.Module], type[PackedRecurrent]] = {nn.LSTM: Int8LSTM, nn.GRU: Int8GRU}
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


def pack_layers(module: nn.Module, targets: Targets, pack: Pack, pack_head: Pack, recurrent: bool = False) -> nn.Module:
    """Replace the selected layers in place and return the module.

    Layers that are packed already are left alone. A head that shares its weight with the embedding is packed in int8 together
    with it, so that the two stay tied. With ``recurrent``, LSTMs and GRUs are packed in int8 too.
    """
    if isinstance(module, nn.Linear):
        return pack(module.weight.detach(), bias_of(module))
    if recurrent and type(module) in RECURRENT:
        return RECURRENT[type(module)].from_plain(module)  # type: ignore[arg-type]
    return pack_named(module, targets.select(candidates(module, recurrent), hidden_weights(module)), pack, pack_head)


def pack_named(module: nn.Module, names: Iterable[str], pack: Pack, pack_head: Pack) -> nn.Module:
    """Replace the layers of these names in place and return the module; see ``pack_layers``."""
    head = output_head(module)
    for name in names:
        layer = module.get_submodule(name)
        embeddings = tied_embeddings(module, layer)
        try:
            if type(layer) in RECURRENT:
                replace_layer(module, name, RECURRENT[type(layer)].from_plain(layer))  # type: ignore[arg-type]
            elif embeddings:
                _pack_tied(module, embeddings, name, layer)
            else:
                replace_layer(module, name, (pack_head if name == head else pack)(weight_of(layer), bias_of(layer)))
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
    return module


def candidates(module: nn.Module, recurrent: bool = False) -> dict[str, nn.Module]:
    """Return the linear layers that are not packed yet, and with ``recurrent`` such LSTMs and GRUs too."""
    found = {name: layer for name, layer in linear_layers(module).items() if "weight" in layer._parameters}
    return found | ({name: layer for name, layer in module.named_modules() if type(layer) in RECURRENT} if recurrent else {})


def selected(module: nn.Module, targets: Targets, doing: str, recurrent: bool = False) -> dict[str, nn.Module]:
    """Return the layers that packing would change, after refusing models whose weights would be missed.

    Raises:
        TransformError: matrices stand outside the layers that can be packed, a layer has no packed form, or an embedding that
            computes more than a look-up times a number shares its weight.
        TargetError: a pattern matches nothing.
    """
    if recurrent and type(module) in RECURRENT:
        refuse_recurrent(module, type(module))  # type: ignore[arg-type]
        return {type(module).__name__: module}
    layers = candidates(module, recurrent)
    refuse_hidden_weights(module, targets.exclude, doing, layers)
    chosen = {name: layers[name] for name in targets.select(layers, hidden_weights(module))}
    for name, layer in chosen.items():
        if type(layer) in RECURRENT:
            try:
                refuse_recurrent(layer, type(layer))  # type: ignore[arg-type]
            except TransformError as error:
                raise TransformError(f"{doing} cannot pack {name}: {error}: targets: {{exclude: ['{name}']}}") from None
        embeddings = tied_embeddings(module, layer)
        for other, embedding in embeddings.items():
            multiplier = multiplier_of(embedding)
            if multiplier is None or multiplier != multiplier_of(next(iter(embeddings.values()))):
                what = f"computes more than a look-up times {'one' if multiplier is None else 'the same'} number"
                raise TransformError(
                    f"{doing} cannot pack {name}: it shares its weight with {other}, and {type(embedding).__name__} {what}; "
                    f"leave both as they are: targets: {{exclude: ['{name}']}}"
                )
    return chosen


def _pack_tied(module: nn.Module, embeddings: Mapping[str, nn.Embedding], head_name: str, head: nn.Module) -> None:
    """Pack the first of the embeddings; it takes the place of the others, and the head is tied to it."""
    first = next(iter(embeddings.values()))
    packed = Int8Embedding.from_embedding(first, multiplier_of(first))
    tied = Int8Linear.tied_to(packed, bias_of(head))
    for name in embeddings:
        replace_layer(module, name, packed)
    replace_layer(module, head_name, tied)


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias of a layer, or None."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None
