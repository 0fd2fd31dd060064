"""What the transforms that set weights to zero share: how many, and where."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Execution
from optkit.core.targets import Targets
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import (
    hidden_weights,
    inner_layers,
    is_on_meta,
    refuse_hidden_weights,
    weight_of,
)
from optkit.transforms.moments import Moments, by_blocks, refuse_missed
from optkit.transforms.prune.masks import Pattern

_DEFAULT_SHARE = 0.5


class WeightPruning(Transform):
    """Zeros among the weights of linear layers; the output head and what is tied to an embedding are left alone."""

    stage: ClassVar[Stage] = Stage.PRUNE
    execution: ClassVar[Execution] = "simulated"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of weights set to zero; default: 0.5, or what the pattern says"
    )
    pattern: str | None = Field(default=None, description="N:M, such as 2:4: N of every M columns are kept; instead of sparsity")
    targets: Targets = Field(default=Targets(), description="linear layers to prune")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.pattern is not None:
            Pattern.parse(self.pattern)
            if self.sparsity is not None:
                raise ValueError("sparsity and pattern both say how many weights go; give one of them")
        return self

    @property
    def keeps(self) -> Pattern | float:
        """The pattern of what is kept, or the share of what goes."""
        if self.pattern is not None:
            return Pattern.parse(self.pattern)
        return _DEFAULT_SHARE if self.sparsity is None else self.sparsity

    def check(self, plan: Plan) -> None:
        """Refuse patterns of names that match nothing, weights that would be missed, and layers whose columns N:M does not divide."""
        self.layers_of(plan.subject.module)

    def layers_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to prune, by name; a bare linear layer is called by its class.

        Raises:
            TransformError: weights would be missed, or M of N:M does not divide the columns of a layer.
            TargetError: a pattern matches nothing.
        """
        word = self.step().name
        if isinstance(module, nn.Linear):
            chosen: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            refuse_hidden_weights(module, self.targets.exclude, word)
            able = inner_layers(module)
            chosen = {name: able[name] for name in self.targets.select(able, hidden_weights(module))}
        if isinstance(self.keeps, Pattern):
            odd = {name: weight_of(layer).shape[1] for name, layer in chosen.items() if weight_of(layer).shape[1] % self.keeps.of}
            if odd:
                name, width = next(iter(odd.items()))
                raise TransformError(
                    f"pattern {self.pattern} does not divide in_features {width} of {name} ({len(odd)} of {len(chosen)} layers); "
                    f"exclude such layers: targets: {{exclude: ['{name}']}}"
                )
        return chosen


class CalibratedPruning(WeightPruning):
    """Weight pruning that looks at what the layers read, block after block."""

    @property
    def needs_data(self) -> bool:
        """The inputs of the layers decide."""
        return True

    @torch.no_grad()
    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with zeros among its weights; each block sees what the pruned blocks before it answer.

        Raises:
            TransformError: there is no data, or it reaches none of the layers; an input is not finite.
        """
        layers = self.layers_of(module)
        if is_on_meta(module):
            return module
        if data is None or not data.batches:
            raise TransformError(f"{self.step().name} needs calibration data; give some, or use magnitude, which needs none")
        alone = isinstance(module, nn.Linear)
        whole, names = (nn.Sequential(module), ["0"]) if alone else (module, list(layers))
        reached: set[str] = set()

        def work(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                weight = weight_of(whole.get_submodule(name))
                try:
                    weight.copy_(self.pruned(weight, seen.gram))
                except TransformError as error:
                    raise TransformError(f"{name}: {error}") from None
                reached.add(name)

        by_blocks(whole, data, names, work)
        refuse_missed(names, reached)
        return module

    @abstractmethod
    def pruned(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Return the weight (out, in) with its zeros, for the mean ``gram`` (in, in) of x x^T over the layer's inputs."""
