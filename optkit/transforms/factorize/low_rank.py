"""Replaces linear layers by products of two thinner ones: fewer weights to read. At a given size int8 and int4 lose far less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.low_rank import LowRankLinear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.factorize.svd import allotted, energies, rank_within, truncated
from optkit.transforms.layers import (
    hidden_weights,
    inner_layers,
    is_on_meta,
    refuse_hidden_weights,
    replace_layer,
    weight_of,
)
from optkit.transforms.moments import Moments, by_blocks, refuse_missed
from optkit.transforms.prune.importance import loudness, predicts_tokens

_HEARD = 8  # batches from which the loss's gradients are known well enough


class LowRank(Transform):
    """Two factors for linear layers, found so that their outputs change least; the output head is left alone.

    The bytes to be saved are saved where it costs least, and some layers may stay as they are. For a language model that is where the loss
    hears least of it, for others where a layer's outputs change least.
    """

    stage: ClassVar[Stage] = Stage.FACTORIZE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "optkit"
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.2, description="share of the bytes of all these layers that is removed")
    method: Literal["whitened", "plain"] = Field(
        default="whitened", description="whether the outputs on calibration data change least, or the weights themselves (for comparison)"
    )
    targets: Targets = Field(default=Targets(), description="linear layers to factorize")
    ranks: Mapping[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="rank by layer, where it is known; found by data otherwise, and then written here"
    )

    @property
    def needs_data(self) -> bool:
        """The plain method looks at weights alone."""
        return self.method == "whitened"

    @property
    def data_items(self) -> int:
        """Three times the usual: moments of wide layers have many entries to be known."""
        return 96

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Return the transform with the ranks that the data has found."""
        if self.ranks or self.method == "plain" or isinstance(module, nn.Linear) or is_on_meta(module):
            return self
        return self.model_copy(update={"ranks": self._allot(module, self._layers(module), data)})

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing, weights that would be missed, and layers too small for a rank of one."""
        self._layers(plan.subject.module)

    @torch.no_grad()
    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with two layers for each of the chosen; each block sees what the ones before it answer by then.

        Raises:
            TransformError: there is no data, or it reaches none of the layers.
        """
        layers = self._layers(module)
        if isinstance(module, nn.Linear):
            whole = nn.Sequential(module)
            return self._factorize(whole, ["0"], data).get_submodule("0")
        return self._factorize(module, layers, data)

    def _factorize(self, module: nn.Module, names: list[str], data: Calibration | None) -> nn.Module:
        if is_on_meta(module) or self.method == "plain":
            for name in self.ranks or names:
                rows, columns = weight_of(module.get_submodule(name)).shape
                self._split(module, name, self.ranks.get(name) or rank_within(rows, columns, self.ratio), None)
            return module
        ranks = self.ranks or self._allot(module, names, data)
        loud = self._loudness(module, list(ranks), data)

        def work(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                self._split(module, name, ranks[name], seen.gram, loud.get(name))

        by_blocks(module, data or Calibration(), list(ranks), work)
        return module

    @torch.no_grad()
    def _allot(self, module: nn.Module, names: list[str], data: Calibration | None) -> dict[str, int]:
        if data is None or not data.batches:
            raise TransformError("low_rank needs calibration data to whiten by; give some, or use method: plain")
        spectra: dict[str, Tensor] = {}
        loud = self._loudness(module, names, data)

        def look(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                found = energies(weight_of(module.get_submodule(name)), seen.gram, loud.get(name))
                spectra[name] = found if loud else found / found.sum().clamp(min=1e-300)

        by_blocks(module, data, names, look)
        refuse_missed(names, spectra)
        return allotted({name: (spectra[name], *weight_of(module.get_submodule(name)).shape) for name in names}, self.ratio)

    def _loudness(self, module: nn.Module, names: list[str], data: Calibration | None) -> dict[str, Tensor]:
        if data is None or not predicts_tokens(module, data):
            return {}
        return loudness(module, replace(data, batches=data.batches[:_HEARD]), names)

    def _split(self, module: nn.Module, name: str, rank: int, gram: Tensor | None, loud: Tensor | None = None) -> None:
        layer = module.get_submodule(name)
        weight, bias = weight_of(layer), layer._parameters.get("bias")
        if weight.is_meta:
            factors = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
        else:
            factors = truncated(weight, rank, gram, loud)
        replace_layer(module, name, LowRankLinear.of(*factors, bias).train(layer.training))

    def _layers(self, module: nn.Module) -> list[str]:
        if isinstance(module, nn.Linear):
            able: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            refuse_hidden_weights(module, self.targets.exclude, "low_rank")
            able = inner_layers(module)
        names = list(able) if isinstance(module, nn.Linear) else self.targets.select(able, hidden_weights(module))
        unknown = [name for name in self.ranks if name not in names]
        if unknown:
            raise TransformError(f"ranks: there is no {unknown[0]} among the {len(names)} layers to factorize")
        for name in names:
            rows, columns = weight_of(able[name]).shape
            if not rank_within(rows, columns, self.ratio):
                least = 1 - (rows + columns) / (rows * columns)
                raise TransformError(
                    f"ratio {self.ratio} leaves {name} ({rows} x {columns}) less than a rank of 1; use a ratio of at most {least:.2f}, or "
                    f"exclude it: targets: {{exclude: ['{name}']}}"
                )
        return names
