"""Sets the smallest weights to zero. No kernel here skips zeros, so the speed of this is a simulation; the quality is real."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.contract import Plan
from optkit.transforms.layers import is_on_meta, weight_of
from optkit.transforms.prune.contract import WeightPruning
from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest


class Magnitude(WeightPruning):
    """Pruning by absolute value (Han et al. 2015, arXiv 1506.02626). Output head and embeddings are left alone."""

    scope: Literal["layer", "global"] = Field(default="layer", description="whether each layer loses this share, or all together")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing, weights that would be missed, and N:M over all layers together."""
        super().check(plan)
        if self.pattern is not None and self.scope == "global":
            raise TransformError("a pattern holds within each row, so there is no global scope for it; use scope: layer")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with the smallest weights at zero."""
        weights = [weight_of(layer) for layer in self.layers_of(module).values()]
        if is_on_meta(module):
            return module
        groups = [[weight] for weight in weights] if self.scope == "layer" else [weights]
        for group in groups:
            if isinstance(self.keeps, Pattern):
                group[0].masked_fill_(beyond_pattern(group[0].abs().float(), self.keeps), 0)
            else:
                zero_smallest(group, self.keeps)
        return module


@torch.no_grad()
def zero_smallest(weights: list[Tensor], sparsity: float) -> None:
    """Set exactly ``round(sparsity * n)`` of the n weights, the smallest by absolute value over all tensors together, to zero in place."""
    doomed = smallest(torch.cat([weight.abs().flatten().float() for weight in weights]), sparsity)
    for weight, mask in zip(weights, doomed.split([weight.numel() for weight in weights]), strict=True):
        weight.data.masked_fill_(mask.view(weight.shape), 0)
