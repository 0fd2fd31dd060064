"""What pruning of whole units shares: which go, how the rest makes good for them, and the cut itself, held to its answers.

A unit is a feed-forward unit, a group of heads, or a channel of the hidden states. Fewer of them make a smaller dense model: faster
everywhere, and open in plain transformers.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import is_on_meta, weight_of
from optkit.transforms.moments import Moments, by_blocks
from optkit.transforms.prune.dimensions import Place, Width, cut, places_of, silence
from optkit.transforms.prune.importance import activation, magnitude, taylor
from optkit.transforms.tracing import answer_of, evaluating, some_tokens

Importance = Literal["activation", "taylor", "magnitude"]
_DAMPING = 1e-3
_TOLERANCES = {torch.float32: 2e-3, torch.float64: 1e-4}
_LOW_TOLERANCE = 0.05  # for half precision


class StructuredPruning(Transform):
    """The base of what removes the least important units, as many in every layer, so that the configuration can say how many are left."""

    stage: ClassVar[Stage] = Stage.PRUNE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    what: ClassVar[str]
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.25, description="share of the units that is removed")
    importance: Importance = Field(
        default="activation",
        description="by the mean square of a unit's values, by its first-order effect on the loss, or by its weights alone",
    )
    compensation: Literal["weights", "bias", "none"] = Field(
        default="weights",
        description="what makes good for the removed: the weights of the rest by least squares, the mean in a bias, or nothing",
    )

    @property
    def needs_data(self) -> bool:
        """Only weights alone can be judged without data."""
        return self.importance != "magnitude" or self.compensation != "none"

    @abstractmethod
    def width(self, module: nn.Module) -> Width:
        """Return how many units there are."""

    @abstractmethod
    def kept(self, units: int) -> int:
        """Return how many units stay.

        Raises:
            TransformError: none would go, or all.
        """

    def places(self, module: nn.Module) -> list[Place]:
        """Return everything that has this width."""
        return places_of(module, self.width(module), self.what)

    @property
    def configured(self) -> bool:
        """Whether the configuration can say how many units are left."""
        return True

    def group_of(self, place: Place) -> str:
        """Return what the places that share their units have in common: the name of the module that holds the layer."""
        return place.layer.rpartition(".")[0]

    def about_to_cut(self, module: nn.Module, groups: Mapping[str, list[Place]], units: int, count: int) -> None:
        """Change what would answer otherwise only because it sees fewer units."""

    def check(self, plan: Plan) -> None:
        """Refuse models whose configuration cannot say the new width, and ratios that remove nothing or everything."""
        self._groups(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the narrower module; its configuration says so too.

        Raises:
            TransformError: there is no data, or it reaches none of the layers; an input is not finite; the model does not answer as
                its uncut self with silent units, because something in it counts units that the shapes do not show.
        """
        width = self.width(module)
        count, groups = self.kept(width.units), self._groups(module)
        write = (lambda config: width.write(config, count)) if self.configured else None
        if is_on_meta(module):
            cut(module, write, {p: torch.arange(count) for places in groups.values() for p in places})
            return module
        if self.needs_data and (data is None or not data.batches):
            raise TransformError(f"{self.step().name} needs calibration data; give some, or use importance: magnitude, compensation: none")
        kept = self._silence(module, groups, data or Calibration(), width.units, count)
        uniform = {len(units) for units in kept.values()} == {count}
        batch = _few(data) if data is not None and data.batches else some_tokens(module)
        with evaluating(module):
            before = answer_of(module, batch)
            self.about_to_cut(module, groups, width.units, count)
            cut(module, write if uniform else None, kept)
            after = answer_of(module, batch)
        off = float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-12))
        if not off <= _TOLERANCES.get(before.dtype, _LOW_TOLERANCE):
            raise TransformError(
                f"{type(module).__name__} answers otherwise without its silent {self.what} than with them (by {off:.2g} of the norm): "
                "something in it counts them that the shapes do not show, such as a position bias for each head; prune another width"
            )
        return module

    def _groups(self, module: nn.Module) -> dict[str, list[Place]]:
        """Return the places of units that go together, by the name of what holds them."""
        self.kept(self.width(module).units)
        groups: dict[str, list[Place]] = {}
        for place in self.places(module):
            self._refuse_place(module, place)
            groups.setdefault(self.group_of(place), []).append(place)
        for name, places in groups.items():
            readers = [place for place in places if place.reads]
            if len(readers) != 1:
                raise TransformError(f"{name}: {len(readers)} layers read its {self.what}, and 1 is known how to prune")
            if self.compensation == "bias" and module.get_submodule(readers[0].layer)._parameters.get("bias") is None:
                raise TransformError(f"{readers[0].layer} has no bias that could make good for units; use compensation: weights")
        return groups

    def _refuse_place(self, module: nn.Module, place: Place) -> None:
        layer = module.get_submodule(place.layer)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise TransformError(
                f"{place.layer} ({type(layer).__name__}) has a size that goes with the {self.what}, and is no linear layer; "
                "prune another width"
            )

    def counts(self, scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
        """Return how many units each group keeps, given the scores (units,) of all groups where not all keep as many."""
        raise NotImplementedError

    @property
    def even(self) -> bool:
        """Whether all groups keep as many units, so that the configuration can say so."""
        return True

    @torch.no_grad()
    def _silence(
        self, module: nn.Module, groups: Mapping[str, list[Place]], data: Calibration, units: int, count: int
    ) -> dict[Place, Tensor]:
        """Choose the units of every group, make good for the others and set those to zero; return what is kept of each place."""
        kept: dict[Place, Tensor] = {}
        reader_of = {name: next(place for place in places if place.reads) for name, places in groups.items()}
        effects = taylor(module, data, reader_of.values(), units) if self.importance == "taylor" else {}

        def scores_of(name: str, seen: Moments | None) -> Tensor:
            if self.importance == "taylor":
                return effects[reader_of[name].layer]
            if self.importance == "magnitude" or seen is None:
                return magnitude(module, groups[name], units)
            return activation(module, reader_of[name], seen, units)

        def over(act: Callable[[str, Moments | None], None]) -> None:
            def work(moments: Mapping[str, Moments]) -> None:
                for name, reader in reader_of.items():
                    if reader.layer in moments or not self.needs_data:
                        act(name, moments.get(reader.layer))

            if self.needs_data:
                by_blocks(module, data, [reader.layer for reader in reader_of.values()], work)
            else:
                work({})

        found: dict[str, Tensor] = {}
        if not self.even:
            over(lambda name, seen: found.update({name: scores_of(name, seen)}))
        counts = dict.fromkeys(groups, count) if self.even else self.counts(found, count)

        def take(name: str, seen: Moments | None) -> None:
            order = scores_of(name, seen).argsort(descending=True, stable=True)
            stay, go = order[: counts[name]].sort().values, order[counts[name] :].sort().values
            if seen is not None:
                reader = reader_of[name]
                self.make_good(module.get_submodule(reader.layer), reader.entries(stay), reader.entries(go), seen)
            for place in groups[name]:
                silence(module, place, go)
                kept[place] = stay

        over(take)
        missed = [name for name, places in groups.items() if places[0] not in kept]
        if missed:
            raise TransformError(f"no calibration data reached {len(missed)} of {len(groups)} groups of layers ({', '.join(missed[:3])})")
        return kept

    def make_good(self, layer: nn.Module, stay: Tensor, go: Tensor, seen: Moments) -> None:
        """Let the inputs of a layer that stay, by their positions, stand in for those that go."""
        weight = weight_of(layer)
        if self.compensation == "weights":
            weight[:, stay] += (weight[:, go].float() @ shares(seen.gram, stay, go)).to(weight.dtype)
        elif self.compensation == "bias":
            bias = layer.get_parameter("bias").detach()
            bias += (weight[:, go].float() @ seen.mean[go]).to(bias.dtype)


def shares(gram: Tensor, stay: Tensor, go: Tensor) -> Tensor:
    """Return (go, stay): the weights by which the inputs that stay come nearest to each of those that go, by least squares.

    Args:
        gram: (in, in), the mean of x x^T.
        stay: positions of the inputs that stay.
        go: positions of the others.
    """
    inside = gram[stay][:, stay]
    inside.diagonal().add_(_DAMPING * float(gram.diagonal().mean()) + 1e-12)
    return torch.cholesky_solve(gram[stay][:, go], torch.linalg.cholesky(inside)).T


def _few(data: Calibration) -> dict[str, Tensor]:
    first = data.batches[0]
    only_tokens = set(first) == {"input_ids"}
    return {name: tensor[:1, :12] if only_tokens else tensor[:1] for name, tensor in first.items()}


def block_of(place: Place) -> str:
    """Return the block that a layer stands in, or else the module that holds it."""
    found = re.match(r"(.*\.\d+)\.", place.layer)
    return found[1] if found else place.layer.rpartition(".")[0]


def rounded(units: int, ratio: float, multiple: int, what: str) -> int:
    """Return how many of the units stay, a multiple of a number.

    Raises:
        TransformError: the nearest multiple would keep all of them, or none.
    """
    count = round(units * (1 - ratio) / multiple) * multiple
    if 0 < count < units:
        return count
    able = [keep for keep in (units - units % multiple - (0 if units % multiple else multiple), multiple) if 0 < keep < units]
    ratios = " or ".join(dict.fromkeys(f"{1 - keep / units:.3g}" for keep in able))
    way = f"use ratio {ratios}" if able else "use a smaller multiple, or leave this step out"
    raise TransformError(f"ratio {ratio} of {units} {what} leaves {count} at multiples of {multiple}; {way}")
