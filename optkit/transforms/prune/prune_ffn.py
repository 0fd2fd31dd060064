"""Removes feed-forward units: a narrower model that is faster everywhere. It opens in plain transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from optkit.core.subject import Step
from optkit.transforms.prune.dimensions import FFN, Place, Width, ffn_width
from optkit.transforms.prune.structured import StructuredPruning, block_of, rounded


class PruneFfn(StructuredPruning):
    """Fewer units in every feed-forward layer, those that matter least going first."""

    what: ClassVar[str] = FFN
    uniform: bool = Field(
        default=True,
        description="whether every layer keeps as many; if not, no configuration says so, and only optkit.load opens the model",
    )
    multiple: Annotated[int, Field(ge=1, le=4096)] = Field(default=64, description="the width that is left is a multiple of this")

    def width(self, module: nn.Module) -> Width:
        """Return the width of the feed-forward layers."""
        return ffn_width(module)

    def kept(self, units: int) -> int:
        """Return how many units stay, a multiple of ``multiple``."""
        return rounded(units, self.ratio, self.multiple, self.what)

    @property
    def even(self) -> bool:
        """As the setting says."""
        return self.uniform

    def step(self) -> Step:
        """Return the step; layers of different widths need optkit to be opened."""
        return super().step() if self.uniform else replace(super().step(), opens_in="optkit")

    def counts(self, scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
        """Take the least important units of all layers together, each layer's scores as shares of their sum; round to ``multiple``.

        The layer whose next unit matters least gives up ``multiple`` of them, again and again, until the share is reached.
        """
        falling = {name: (found / found.sum().clamp(min=1e-30)).sort(descending=True).values for name, found in scores.items()}
        left = {name: len(found) // self.multiple * self.multiple for name, found in falling.items()}
        while sum(left.values()) > count * len(left):
            able = [name for name in left if left[name] > self.multiple]
            cheapest = min(able, key=lambda name: float(falling[name][left[name] - self.multiple : left[name]].sum()))
            left[cheapest] -= self.multiple
        return left

    def group_of(self, place: Place) -> str:
        """Return the block that holds the layer: an encoder spreads a feed-forward layer over several modules of it."""
        return block_of(place)
