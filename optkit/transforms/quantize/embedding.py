"""Packs an input embedding in int8 where no head takes it along. It saves storage; of the table, one row a token was read anyway."""

from __future__ import annotations

from torch import nn

from optkit.core.errors import TransformError
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Embedding
from optkit.transforms.layers import hidden_weights, multiplier_of, replace_layer
from optkit.transforms.quantize.packing import candidates


def refuse_embedding(module: nn.Module, targets: Targets, doing: str) -> None:
    """Refuse to pack the input embedding where there is none that can be packed by itself or together with its head.

    Raises:
        TransformError: the module has none, it computes more than a look-up, or the head that shares its weight is left as it is.
    """
    name, embedding = _input_embedding(module)
    if embedding is None:
        raise TransformError(f"embedding: {type(module).__name__} has no input embedding to pack; leave the setting out")
    if isinstance(embedding, Int8Embedding):
        return
    if multiplier_of(embedding) is None or embedding.max_norm is not None:
        kind = type(embedding).__name__
        raise TransformError(
            f"embedding: {doing} cannot pack {name}: {kind} computes more than a look-up times a number; leave the setting out"
        )
    layers = candidates(module)
    twins = {other for other, layer in layers.items() if layer._parameters["weight"] is embedding.weight}
    left = sorted(twins.difference(targets.select(layers, hidden_weights(module))))
    if left:
        raise TransformError(f"embedding: {name} shares its weight with {left[0]}, which targets exclude; exclude it from neither or both")


def pack_embedding(module: nn.Module) -> nn.Module:
    """Replace the input embedding by one of int8 rows in place. To be called last: one that its head has taken along is packed already."""
    name, embedding = _input_embedding(module)
    if embedding is not None and not isinstance(embedding, Int8Embedding):
        try:
            replace_layer(module, name, Int8Embedding.from_embedding(embedding, multiplier_of(embedding)))
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
    return module


def _input_embedding(module: nn.Module) -> tuple[str, nn.Embedding | None]:
    find = getattr(module, "get_input_embeddings", None)
    sole = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    found = find() if callable(find) else sole[0] if len(sole) == 1 else None
    name = next((name for name, layer in module.named_modules() if layer is found), "")
    return name, found if isinstance(found, nn.Embedding) else None
