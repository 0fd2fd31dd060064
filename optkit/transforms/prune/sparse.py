"""Stores layers with many zeros as bits and values, and runs them so: what pruning has set to zero is neither kept nor read any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, overload

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels.sparse import SparseLinear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import hidden_weights, is_on_meta, linear_layers, replace_layer, tied_embedding, weight_of


class Sparse(Transform):
    """Linear layers without their zeros, after ``magnitude``, ``wanda``, ``sparsegpt`` or ``distill`` with gradual pruning.

    With AVX-512 steps of a token read fewer bytes and are faster for it; elsewhere only the file is smaller.
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE
    least: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.3, description="share of zeros from which on a layer is stored so")
    targets: Targets = Field(default=Targets(), description="linear layers to look at")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing; how many zeros there are is only known from the weights."""
        self._layers(plan.subject.module)

    def preview(self, subject: Subject) -> Subject:
        """Return the layers as they are: which of them have enough zeros is only known from the weights."""
        return replace(subject, history=(*subject.history, self.step()))

    @overload
    def apply(self, model: Subject, data: Calibration | None = None) -> Subject: ...
    @overload
    def apply(self, model: nn.Module, data: Calibration | None = None) -> nn.Module: ...
    def apply(self, model: Subject | nn.Module, data: Calibration | None = None) -> Subject | nn.Module:
        """Return the model with sparse layers. In a subject's history, steps that made zeros are simulated no more, unless layers outside
        of the targets are still full of them.

        Raises:
            TransformError: no layer has enough zeros.
        """
        if isinstance(model, nn.Module):
            return self.change(model, data)
        module = self.change(model.module, data)
        before = model.history
        if not is_on_meta(module) and not self._left(module):
            before = tuple(replace(step, execution="real") if step.execution == "simulated" else step for step in before)
        return replace(model, module=module, history=(*before, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with sparse layers where there are enough zeros.

        Raises:
            TransformError: no layer has enough zeros.
        """
        layers = self._layers(module)
        if is_on_meta(module):
            return module
        shares = _shares(layers)
        chosen = [name for name, share in shares.items() if share >= self.least]
        if not chosen:
            name, share = max(shares.items(), key=lambda item: item[1])
            raise TransformError(
                f"no layer has {self.least:.0%} zeros; {name} has most, {share:.0%}: prune first, by magnitude, wanda or sparsegpt"
            )
        if isinstance(module, nn.Linear):
            return _sparse(module)
        for name in chosen:
            replace_layer(module, name, _sparse(layers[name]))
        return module

    def _left(self, module: nn.Module) -> list[str]:
        """Return the layers that keep as many zeros as others are stored sparse for."""
        dense = {name: layer for name, layer in linear_layers(module).items() if isinstance(layer._parameters.get("weight"), nn.Parameter)}
        return [name for name, share in _shares(dense).items() if share >= self.least]

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        if isinstance(module, nn.Linear):
            return {type(module).__name__: module}
        able = {
            name: layer
            for name, layer in linear_layers(module).items()
            if "weight" in layer._parameters and tied_embedding(module, layer) is None
        }
        return {name: able[name] for name in self.targets.select(able, hidden_weights(module))}


def _shares(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the share of zeros by layer."""
    return {name: float((weight_of(layer) == 0).float().mean()) for name, layer in layers.items()}


def _sparse(layer: nn.Module) -> SparseLinear:
    return SparseLinear.from_weight(weight_of(layer), layer._parameters.get("bias")).train(layer.training)
