"""A linear layer as the product of two thinner ones. Both are layers of their own, so that what packs layers packs them too."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = up(down(x)): ``down`` is (rank, in) without a bias, ``up`` is (out, rank) with the bias."""

    open_inside = True  # an artefact tells of the layers within, where they are packed

    def __init__(self, down: nn.Module, up: nn.Module, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def of(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> Self:
        """Return a layer of two weights (rank, in) and (out, rank), and a bias (out,)."""
        (rank, columns), rows = down.shape, len(up)
        layer = cls.empty(columns, rows, rank, bias is not None)
        layer.down.weight, layer.up.weight = nn.Parameter(down.detach()), nn.Parameter(up.detach())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def empty(cls, in_features: int, out_features: int, rank: int, bias: bool) -> Self:
        """Return a layer of this shape whose weights are still to be set."""
        with torch.device("meta"):
            down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias)
        return cls(down, up, in_features, out_features, rank)

    @property
    def weight(self) -> Tensor:
        """The product (out, in), for those that only look at a layer's weight."""
        up, down = self.up.weight, self.down.weight
        assert isinstance(up, Tensor) and isinstance(down, Tensor)
        return up @ down

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,)."""
        return self.up._parameters["bias"]

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty`` that make a layer of this shape, as JSON."""
        bias = self.up.bias is not None
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank, "bias": bias}

    def forward(self, input: Tensor) -> Tensor:
        """Return x (up down)^T + b for an input (..., in)."""
        output: Tensor = self.up(self.down(input))
        return output

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
