"""Sets the smallest weights to zero. No kernel here skips zeros, so the speed of this is a simulation; the quality is real."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.subject import Calibration, Execution
from optkit.core.targets import Targets
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import hidden_weights, is_on_meta, linear_layers, output_head, refuse_hidden_weights, tied_embedding


class Magnitude(Transform):
    """Unstructured pruning by absolute value (Han et al. 2015, arXiv 1506.02626). Output head and embeddings are left alone."""

    stage: ClassVar[Stage] = Stage.PRUNE
    execution: ClassVar[Execution] = "simulated"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.5, description="share of weights set to zero")
    scope: Literal["layer", "global"] = Field(default="layer", description="whether each layer loses this share, or all together")
    targets: Targets = Field(default=Targets(), description="linear layers to prune")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and weights that would be missed."""
        self._weights(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with the smallest weights at zero."""
        weights = self._weights(module)
        if is_on_meta(module):
            return module
        groups = [[weight] for weight in weights] if self.scope == "layer" else [weights]
        for group in groups:
            zero_smallest(group, self.sparsity)
        return module

    def _weights(self, module: nn.Module) -> list[Tensor]:
        if isinstance(module, nn.Linear):
            return [module.weight]
        refuse_hidden_weights(module, self.targets.exclude, "magnitude")
        head = output_head(module)
        layers = {
            name: layer
            for name, layer in linear_layers(module).items()
            if name != head and "weight" in layer._parameters and tied_embedding(module, layer) is None
        }
        return [layers[name].weight for name in self.targets.select(layers, hidden_weights(module))]  # type: ignore[misc]


@torch.no_grad()
def zero_smallest(weights: list[Tensor], sparsity: float) -> None:
    """Set exactly ``round(sparsity * n)`` of the n weights, the smallest by absolute value over all tensors together, to zero in place."""
    flat = torch.cat([weight.abs().flatten().float() for weight in weights])
    count = round(sparsity * flat.numel())
    doomed = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    doomed[flat.argsort(stable=True)[:count]] = True
    for weight, mask in zip(weights, doomed.split([weight.numel() for weight in weights]), strict=True):
        weight.data.masked_fill_(mask.view(weight.shape), 0)
