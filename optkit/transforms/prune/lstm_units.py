"""Units of an LSTM, cut out with all that belongs to them: the rows of the four gates, and the column by which the others hear of them.

Both directions of an LSTM have as many units, so that a unit of the one goes with that of the other which has its number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

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


def lstm_pruner() -> Any:
    """Return how torch-pruning shall cut LSTMs: its own way leaves the gates of the wrong length."""
    from torch_pruning.pruner.function import LSTMPruner

    class Units(LSTMPruner):  # type: ignore[misc]
        """Whole units out; inputs as before."""

        def prune_out_channels(self, layer: nn.LSTM, idxs: list[int]) -> nn.Module:
            """Cut these numbers of the output out, which are as many units of each direction."""
            keep_units(layer, set(range(layer.hidden_size)) - {index % layer.hidden_size for index in idxs})
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
