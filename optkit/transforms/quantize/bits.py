"""Replaces linear layers by those of bitsandbytes. Which format is the caller's business; the output head stays unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from optkit.core.errors import TransformError
from optkit.core.targets import Targets
from optkit.transforms.layers import hidden_weights, output_head, refuse_hidden_weights, tied_embedding, weight_of
from optkit.transforms.quantize.packing import Pack, candidates, pack_layers

Refuse = Callable[[int, int], None]


def check_layers(module: nn.Module, targets: Targets, head: bool, doing: str, refuse: Refuse | None = None) -> None:
    """Refuse what cannot be replaced, by name.

    Args:
        module: a model, or one linear layer.
        targets: which layers.
        head: whether the output head is to be replaced too.
        doing: the name of the transform, for messages.
        refuse: raises ``TransformError`` for a layer with so many inputs and outputs.

    Raises:
        TransformError: a layer has sizes that do not fit, or the head shares its weight with the embedding and was asked for.
        TargetError: a pattern matches nothing.
    """
    layers = {type(module).__name__: module} if isinstance(module, nn.Linear) else _chosen(module, targets, head, doing)
    told = {}
    for name, layer in layers.items():
        rows, columns = weight_of(layer).shape
        try:
            if refuse is not None:
                refuse(columns, rows)
        except TransformError as error:
            told[name] = str(error)
    if told:
        name, reason = next(iter(told.items()))
        patterns = sorted({f"*.{one.rpartition('.')[2]}" if "." in one else one for one in told})
        raise TransformError(f"{doing}: {name}: {reason} ({len(told)} of {len(layers)} layers); targets: {{exclude: {patterns}}}")


def replace_layers(module: nn.Module, targets: Targets, head: bool, doing: str, pack: Pack) -> nn.Module:
    """Replace the selected layers in place and return the module. Conv1D layers become linear ones, with the weight turned."""
    if isinstance(module, nn.Linear):
        return pack_layers(module, targets, pack, pack)
    return pack_layers(module, Targets(include=tuple(_chosen(module, targets, head, doing))), pack, pack)


def _chosen(module: nn.Module, targets: Targets, head: bool, doing: str) -> dict[str, nn.Module]:
    refuse_hidden_weights(module, targets.exclude, doing)
    known = candidates(module)
    last = output_head(module)
    layers = {name: known[name] for name in targets.select(known, hidden_weights(module)) if head or name != last}
    for name, layer in layers.items():
        embedding = tied_embedding(module, layer)
        if embedding is not None:
            raise TransformError(
                f"{doing} cannot replace {name}: it shares its weight with {embedding}, and bitsandbytes saves no such embedding; "
                f"leave both as they are: head: false, or targets: {{exclude: ['{name}']}}"
            )
    if not layers:
        raise TransformError(f"{doing}: only the output head {last} is selected, and it is left alone unless asked for: head: true")
    return layers
