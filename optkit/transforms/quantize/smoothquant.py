"""Moves outliers from activations into weights, where a scale a row bears them. By itself it changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Execution
from optkit.core.targets import Targets
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import hidden_weights, is_on_meta, weight_of
from optkit.transforms.quantize.activations import channel_maxima
from optkit.transforms.quantize.folding import Fold, apply_fold, folds, shared
from optkit.transforms.quantize.packing import candidates

_LEAST = 1e-5  # of a channel's largest value, so that silent channels have a scale
_TOKENS = 12  # enough to see where scales can move


class Smoothquant(Transform):
    """Scale the channels of activations down and the weights that read them up (Xiao et al. 2022, arXiv 2211.10438), before an int8.

    A step of preparation: the model computes as before, at the same speed.
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE
    execution: ClassVar[Execution] = "neutral"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="how much of the activations' range moves into the weights; 0 evens out the weights alone"
    )
    through: Literal["norms", "all"] = Field(
        default="norms", description="scales leave activations behind norms alone, or behind any layer that can take them"
    )
    targets: Targets = Field(
        default=Targets(), description="linear layers whose inputs are smoothed; those that share an input go together"
    )

    @property
    def needs_data(self) -> bool:
        """The ranges of the activations come from calibration data."""
        return True

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing; where scales can move is known when the model runs."""
        self._selected(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with scales moved, in place.

        Raises:
            TransformError: there is no data, or no place where a scale can move.
        """
        chosen = self._selected(module)
        if is_on_meta(module):
            return module
        if data is None or not data.batches:
            raise TransformError("smoothquant needs calibration data, and there is none")
        found = [fold for fold in self._folds(module, data) if chosen.issuperset(fold.consumers)]
        if not found:
            raise TransformError(f"smoothquant finds no place in {type(module).__name__} where a scale can move; leave it out")
        ranges = channel_maxima(module, [fold.consumers[0] for fold in found], data, "smoothquant")
        for fold in found:
            weights = [weight_of(module.get_submodule(name)) for name in fold.consumers]
            scale = smoothing_scale(ranges[fold.consumers[0]], weights, self.alpha)
            apply_fold(module, fold, shared(fold, scale))
        return module

    def _selected(self, module: nn.Module) -> set[str]:
        return set(self.targets.select(candidates(module), hidden_weights(module)))

    def _folds(self, module: nn.Module, data: Calibration) -> Iterator[Fold]:
        first = data.batches[0]
        batch = {"input_ids": first["input_ids"][:1, :_TOKENS]} if set(first) == {"input_ids"} else first
        for fold in folds(module, batch):
            weight = module.get_submodule(fold.producer).weight
            if self.through == "all" or (isinstance(weight, Tensor) and weight.ndim == 1):
                yield fold


def smoothing_scale(range_: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """Return s (in,), by which activations are divided and the columns of the weights (out, in) multiplied.

    The law (equation 4 of the paper): s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the maximum taken over all weights together. Ranges
    count as at least a hundred thousandth of the largest one.
    """
    reach = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    most, reach = (values.clamp(min=float(values.max()) * _LEAST or 1.0) for values in (range_.float(), reach))
    return most**alpha / reach ** (1 - alpha)
