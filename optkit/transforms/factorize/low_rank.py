"""Replaces linear layers by products of two thinner ones: fewer weights to read. At a given size int8 and int4 lose far less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

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
    """Two factors for each linear layer, found so that its outputs change least; the output head is left alone."""

    stage: ClassVar[Stage] = Stage.FACTORIZE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "optkit"
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="share of a layer's bytes that is removed; it sets the rank"
    )
    method: Literal["whitened", "plain"] = Field(
        default="whitened", description="whether the outputs on calibration data change least, or the weights themselves (for comparison)"
    )
    targets: Targets = Field(default=Targets(), description="linear layers to factorize")

    @property
    def needs_data(self) -> bool:
        """The plain method looks at weights alone."""
        return self.method == "whitened"

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
        if self.method == "plain" or is_on_meta(module):
            for name in names:
                self._split(module, name, None)
            return module
        if data is None or not data.batches:
            raise TransformError("low_rank needs calibration data to whiten by; give some, or use method: plain")
        done: set[str] = set()

        def work(moments: Mapping[str, Moments]) -> None:
            for name, seen in moments.items():
                self._split(module, name, seen.gram)
                done.add(name)

        by_blocks(module, data, names, work)
        missed = [name for name in names if name not in done]
        if missed:
            raise TransformError(
                f"no calibration data reached {len(missed)} of {len(names)} layers ({', '.join(missed[:3])}); exclude them: "
                f"targets: {{exclude: ['{missed[0]}']}}"
            )
        return module

    def _split(self, module: nn.Module, name: str, gram: Tensor | None) -> None:
        layer = module.get_submodule(name)
        weight, bias = weight_of(layer), layer._parameters.get("bias")
        rank = rank_within(weight.shape[0], weight.shape[1], self.ratio)
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
