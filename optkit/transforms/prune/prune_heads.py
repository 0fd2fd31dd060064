"""Removes attention heads by whole key-value groups, so that the queries left still share keys evenly. It opens in plain transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Step
from optkit.transforms.prune.dimensions import HEADS, Place, Width, encoder_heads, head_groups
from optkit.transforms.prune.structured import StructuredPruning, block_of, rounded


class PruneHeads(StructuredPruning):
    """Fewer groups of heads in every attention layer, those that matter least going first; the width of a head stays.

    Encoders of the BERT kind have no number for the width of a head in their configuration, so that only ``optkit.load`` opens the result.
    """

    what: ClassVar[str] = HEADS
    in_config: bool = Field(
        default=True, description="whether the configuration says how many are left; false for encoders, which only optkit.load opens then"
    )

    def width(self, module: nn.Module) -> Width:
        """Return the number of key-value groups."""
        return head_groups(module) if self.in_config else encoder_heads(module)[0]

    def places(self, module: nn.Module) -> list[Place]:
        """Return what belongs to heads.

        Raises:
            TransformError: the configuration cannot say how many heads are left.
        """
        if not self.in_config:
            return encoder_heads(module)[1]
        try:
            return super().places(module)
        except TransformError as error:
            way = "; or let only optkit.load open the result: in_config: false" if encoder_heads(module, refuse=False)[1] else ""
            raise TransformError(f"{error}{way}") from None

    @property
    def configured(self) -> bool:
        """As the setting says."""
        return self.in_config

    def group_of(self, place: Place) -> str:
        """Return the attention layer, or in an encoder the block, which has it in several modules."""
        return super().group_of(place) if self.in_config else block_of(place)

    def step(self) -> Step:
        """Return the step; what no configuration describes needs optkit to be opened."""
        return super().step() if self.in_config else replace(super().step(), opens_in="optkit")

    def kept(self, units: int) -> int:
        """Return how many groups stay."""
        return rounded(units, self.ratio, 1, self.what)
