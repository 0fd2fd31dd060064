"""Units of an LSTM, cut out with all that belongs to them: the rows of the four gates, and the column by which the others hear of them.

Both directions of an LSTM have as many units, so that a unit of the one goes with that of the other which has its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_GATES = 4


def is_simple(layer: nn.Module) -> bool:
    """Say whether an LSTM has one layer, without a projection: there a unit is one number of the output of its direction."""
    return isinstance(layer, nn.LSTM) and layer.num_layers == 1 and layer.proj_size == 0


@torch.no_grad()
def keep_units(layer: nn.LSTM, kept: Iterable[int]) -> None:
    """Keep these units of a simple LSTM, in order, in each of its directions."""
    units = torch.tensor(sorted(kept), dtype=torch.long)
    rows = torch.cat([units + gate * layer.hidden_size for gate in range(_GATES)])
    for name, parameter in list(layer.named_parameters()):
        shorter = parameter.detach().index_select(0, rows.to(parameter.device))
        if name.startswith("weight_hh"):
            shorter = shorter.index_select(1, units.to(parameter.device))
        setattr(layer, name, nn.Parameter(shorter, requires_grad=parameter.requires_grad))
    layer.hidden_size = len(units)


@torch.no_grad()
def begun_by(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[nn.Module, list[nn.LSTM]]:
    """Return for each LSTM those whose last state it begins with: they have as many units, and the same ones go together."""
    made: dict[int, nn.LSTM] = {}
    kept: list[Any] = []  # so that no id is given twice
    found: dict[nn.Module, list[nn.LSTM]] = {}

    def before(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = given[1] if len(given) > 1 else named.get("hx")
        sources = {made[id(state)] for state in states or () if id(state) in made} - {layer}
        found.setdefault(layer, []).extend(source for source in sources if source not in found.get(layer, []))

    def after(layer: nn.Module, given: Any, output: Any) -> None:
        kept.append(output)
        made.update({id(state): layer for state in output[1]})  # type: ignore[misc]

    layers = [layer for layer in module.modules() if isinstance(layer, nn.LSTM)]
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: sources for layer, sources in found.items() if sources}


def lstm_pruner(together: Mapping[nn.Module, list[nn.LSTM]]) -> Any:
    """Return how torch-pruning shall cut LSTMs, with those that begin them: its own way leaves the gates of the wrong length."""
    from torch_pruning.pruner.function import LSTMPruner

    class Units(LSTMPruner):  # type: ignore[misc]
        """Whole units out; inputs as before."""

        def prune_out_channels(self, layer: nn.LSTM, idxs: list[int]) -> nn.Module:
            """Cut these numbers of the output out, which are as many units of each direction."""
            kept = set(range(layer.hidden_size)) - {index % layer.hidden_size for index in idxs}
            for each in (layer, *together.get(layer, [])):
                keep_units(each, kept)
            return layer

        def get_out_channels(self, layer: nn.LSTM) -> int:
            """Return how many numbers an output has."""
            return layer.hidden_size * (1 + layer.bidirectional)

        def get_out_channel_groups(self, layer: nn.LSTM) -> int:
            """Return how many times the units lie one after another in it."""
            return 1 + layer.bidirectional

        def prune_in_channels(self, layer: nn.LSTM, idxs: list[int]) -> nn.Module:
            """Cut these inputs out."""
            super().prune_in_channels(layer, idxs)
            return layer

    return Units()
