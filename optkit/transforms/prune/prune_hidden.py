"""Removes channels of the hidden states from the whole model: every layer gets narrower. It opens in plain transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.layers import multiplier_of
from optkit.transforms.moments import Moments, by_blocks
from optkit.transforms.prune.dimensions import HIDDEN, Place, Width, hidden_width, places_of, silence
from optkit.transforms.prune.importance import activation, magnitude, taylor
from optkit.transforms.prune.structured import StructuredPruning, rounded


class PruneHidden(StructuredPruning):
    """Fewer channels, the same ones in every layer, those that matter least going first; heads and feed-forward layers stay as wide."""

    what: ClassVar[str] = HIDDEN
    compensation: Literal["weights", "none"] = Field(
        default="weights", description="what makes good for the removed: the weights of the rest by least squares, or nothing"
    )
    multiple: Annotated[int, Field(ge=1, le=4096)] = Field(default=64, description="the width that is left is a multiple of this")

    def width(self, module: nn.Module) -> Width:
        """Return the width of the hidden states."""
        return hidden_width(module)

    def kept(self, units: int) -> int:
        """Return how many channels stay, a multiple of ``multiple``."""
        return rounded(units, self.ratio, self.multiple, self.what)

    def _groups(self, module: nn.Module) -> dict[str, list[Place]]:
        width = self.width(module)
        self.kept(width.units)
        places = places_of(module, width, self.what)
        for place in places:
            self._refuse_place(module, place)
        return {"": places}

    def _refuse_place(self, module: nn.Module, place: Place) -> None:
        layer = module.get_submodule(place.layer)
        if isinstance(layer, nn.Embedding):
            if multiplier_of(layer) != 1:
                raise TransformError(f"{place.layer} multiplies by a number that follows from the hidden width; prune another width")
        elif _is_norm(layer):
            if isinstance(layer, nn.LayerNorm):
                raise TransformError(
                    f"{place.layer} subtracts the mean of all hidden units, and would answer otherwise without some; prune another width"
                )
        else:
            super()._refuse_place(module, place)

    @torch.no_grad()
    def about_to_cut(self, module: nn.Module, groups: Mapping[str, list[Place]], units: int, count: int) -> None:
        """Make norms by the root mean square louder, which are about to see fewer channels: they divide by a mean over fewer."""
        for layer in {place.layer: module.get_submodule(place.layer) for place in groups[""]}.values():
            if _is_norm(layer):
                _louder(layer, (units / count) ** 0.5)

    @torch.no_grad()
    def _silence(
        self, module: nn.Module, groups: Mapping[str, list[Place]], data: Calibration, units: int, count: int
    ) -> dict[Place, Tensor]:
        places = groups[""]
        readers = {place.layer: place for place in places if place.reads}
        order = self._scores(module, places, readers, data, units).argsort(descending=True, stable=True)
        stay, go = order[:count].sort().values, order[count:].sort().values

        def work(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                self.make_good(module.get_submodule(name), stay, go, seen)

        if self.compensation == "weights":
            by_blocks(module, data, list(readers), work)
        for place in places:
            silence(module, place, go)
        return dict.fromkeys(places, stay)

    def _scores(self, module: nn.Module, places: list[Place], readers: Mapping[str, Place], data: Calibration, units: int) -> Tensor:
        """Sum up over all layers what a channel means to them, each layer counting alike."""
        if self.importance == "taylor":
            return torch.stack([found / found.sum() for found in taylor(module, data, readers.values(), units).values()]).sum(0)
        if self.importance == "magnitude":
            return magnitude(module, places, units)
        total = torch.zeros(units)

        def look(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                found = activation(module, readers[name], seen, units)
                total.add_(found / found.sum().clamp(min=1e-30))

        by_blocks(module, data, list(readers), look)
        return total


def _is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower() and not list(layer.children())


def _louder(norm: nn.Module, factor: float) -> None:
    """Multiply the gain of a norm, which may be its weight or 1 more."""
    weight = norm.get_parameter("weight")
    gain = norm(torch.ones(1, len(weight), dtype=weight.dtype))[0]
    offset = (gain.float() - weight.float()).median().round()
    weight.copy_((weight.float() + offset) * factor - offset)
