"""Replaces linear layers by products of two thinner ones: fewer weights to read. At a given size int8 and int4 lose far less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.low_rank import LowRankLinear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import (
    hidden_weights,
    is_on_meta,
    linear_layers,
    output_head,
    refuse_hidden_weights,
    replace_layer,
    tied_embedding,
    weight_of,
)
from optkit.transforms.moments import Moments, by_blocks


class LowRank(Transform):
    """Two factors for linear layers, found so that their outputs change least; the output head is left alone.

    The bytes to be saved are saved where it costs least, and some layers may stay as they are.
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

        def work(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                self._split(module, name, ranks[name], seen.gram)

        by_blocks(module, data or Calibration(), list(ranks), work)
        return module

    @torch.no_grad()
    def _allot(self, module: nn.Module, names: list[str], data: Calibration | None) -> dict[str, int]:
        if data is None or not data.batches:
            raise TransformError("low_rank needs calibration data to whiten by; give some, or use method: plain")
        spectra: dict[str, Tensor] = {}

        def look(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                spectra[name] = energies(weight_of(module.get_submodule(name)), seen.gram)

        by_blocks(module, data, names, look)
        missed = [name for name in names if name not in spectra]
        if missed:
            raise TransformError(
                f"no calibration data reached {len(missed)} of {len(names)} layers ({', '.join(missed[:3])}); exclude them: "
                f"targets: {{exclude: ['{missed[0]}']}}"
            )
        return allotted({name: (spectra[name], *weight_of(module.get_submodule(name)).shape) for name in names}, self.ratio)

    def _split(self, module: nn.Module, name: str, rank: int, gram: Tensor | None) -> None:
        layer = module.get_submodule(name)
        weight, bias = weight_of(layer), layer._parameters.get("bias")
        if weight.is_meta:
            factors = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
        else:
            factors = truncated(weight, rank, gram)
        replace_layer(module, name, LowRankLinear.of(*factors, bias).train(layer.training))

    def _layers(self, module: nn.Module) -> list[str]:
        if isinstance(module, nn.Linear):
            able: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            refuse_hidden_weights(module, self.targets.exclude, "low_rank")
            head = output_head(module)
            able = {
                name: layer
                for name, layer in linear_layers(module).items()
                if name != head and "weight" in layer._parameters and tied_embedding(module, layer) is None
            }
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


def rank_within(rows: int, columns: int, ratio: float) -> int:
    """Return the largest rank whose two factors have at most ``1 - ratio`` of the weights of a (rows, columns) matrix."""
    return int((1 - ratio) * rows * columns / (rows + columns))


def energies(weight: Tensor, gram: Tensor) -> Tensor:
    """Return the squared singular values of W L, falling, in float64 (out,): what each direction adds to the outputs' mean square."""
    exact = weight.double()
    squares: Tensor = torch.linalg.eigvalsh(exact @ gram.double() @ exact.T)
    return squares.flip(0).clamp(min=0)


def allotted(layers: Mapping[str, tuple[Tensor, int, int]], ratio: float) -> dict[str, int]:
    """Return a rank for each layer but those that stay as they are, so that all together lose ``ratio`` of their weights or a little more.

    The law: of all such ranks those with the least sum of what the layers lose, each as a share of its outputs' mean square, found by
    one price for a weight in all layers.

    Args:
        layers: for each its ``energies``, its rows and its columns.
        ratio: share of the weights to be removed.
    """
    options = {}
    for name, (energy, rows, columns) in layers.items():
        most = rank_within(rows, columns, 0.0)
        lost = 1 - energy.cumsum(0)[: max(1, most)] / energy.sum().clamp(min=1e-300)
        costs = torch.arange(1, len(lost) + 1, dtype=torch.float64) * (rows + columns)
        options[name] = torch.cat([lost, lost.new_zeros(1)]), torch.cat([costs, costs.new_tensor([rows * columns])])
    wanted = (1 - ratio) * sum(rows * columns for _, rows, columns in layers.values())

    def at(price: float) -> tuple[dict[str, int], float]:
        chosen = {name: int((lost + price * costs).argmin()) for name, (lost, costs) in options.items()}
        return chosen, sum(float(options[name][1][index]) for name, index in chosen.items())

    low, high = -40.0, 40.0  # the logarithm of the price
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if at(2**middle)[1] <= wanted else (middle, high)
    chosen, _ = at(2**high)
    return {name: index + 1 for name, index in chosen.items() if index < len(options[name][0]) - 1}


@torch.no_grad()
def truncated(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return factors (rank, in) and (out, rank) of the nearest matrix of that rank to a weight (out, in).

    The law: with gram = L L^T and the singular value decomposition W L = U S V^T, the product of U_r and U_r^T W has the least error
    ||(W' - W) L|| of the outputs (SVD-LLM: Wang et al. 2024, arXiv 2403.07378). No inverse of L is needed, so a gram that is not of
    full rank does no harm. Without a gram, L is the identity, and the error is that of the weights.
    """
    exact = weight.double()
    squared = exact @ exact.T if gram is None else exact @ gram.double() @ exact.T  # U S^2 U^T
    left = torch.linalg.eigh(squared).eigenvectors[:, -rank:]
    return (left.T @ exact).to(weight.dtype).contiguous(), left.to(weight.dtype).contiguous()
