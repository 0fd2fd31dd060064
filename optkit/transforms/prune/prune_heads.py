"""Removes attention heads by whole key-value groups, so that the queries left still share keys evenly. It opens in plain transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from optkit.transforms.prune.dimensions import HEADS, Width, head_groups
from optkit.transforms.prune.structured import StructuredPruning, rounded


class PruneHeads(StructuredPruning):
    """Fewer groups of heads in every attention layer, those that matter least going first; the width of a head stays."""

    what: ClassVar[str] = HEADS

    def width(self, module: nn.Module) -> Width:
        """Return the number of key-value groups."""
        return head_groups(module)

    def kept(self, units: int) -> int:
        """Return how many groups stay."""
        return rounded(units, self.ratio, 1, self.what)
