"""Several ways to serve one model behind one engine: few or many sequences, short or long prompts each get the way that suits them."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from optkit.core.errors import OptkitError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines.variants import Variants
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.distill.losses import next_token_loss
from optkit.transforms.runtime.own_forward import refuse_other_engines
from optkit.transforms.runtime.variant import Variant
from optkit.transforms.tracing import evaluating

Size = Annotated[int, Field(ge=1, le=1_000_000)]


class Way(Variant):
    """A variant of the untouched model, and how it is executed."""

    compile: bool = Field(default=True, description="run its steps in optkit's kernels, where these know the model")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None,
        description="threads to compute with; where ways differ, those are passed over that want cores which others use; default: all",
    )


class Adaptive(Transform):
    """Serve by this model as it is, or by variants of the untouched one: whichever is quickest here for a request of this shape.

    What is quickest is measured when the first request comes, for the sizes that are named. No way may be much worse: its perplexity on
    calibration data is held against the untouched model's, and the model is judged by the worst way that is left.
    """

    stage: ClassVar[Stage] = Stage.RUNTIME
    not_for_modules: ClassVar[str] = (
        "adaptive chooses the engine of a subject, and a bare module has none; generate with optkit.engines.AdaptiveEngine"
    )
    ways: tuple[Way, ...] = Field(min_length=1, max_length=8, description="further ways, beside the model as it is")
    most_perplexity: float = Field(
        default=1.02, gt=0, lt=100, description="largest ratio of a way's perplexity to the untouched model's; a way beyond it is left out"
    )
    batch_sizes: tuple[Size, ...] = Field(default=(1, 8), min_length=1, description="sequences at once that are measured")
    prompt_tokens: tuple[Size, ...] = Field(default=(32, 256), min_length=1, description="lengths of prompts that are measured")
    new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=32, description="tokens that a request is expected to ask for")
    perplexities: tuple[float, ...] = Field(
        default=(), description="ratios to the untouched model, of this model and of each way; measured and written by the run"
    )

    @model_validator(mode="after")
    def _a_perplexity_each(self) -> Self:
        if self.perplexities and len(self.perplexities) != 1 + len(self.ways):
            raise OptkitError(f"perplexities are {len(self.perplexities)}, and there are {1 + len(self.ways)} ways with the model as it is")
        return self

    @property
    def needs_data(self) -> bool:
        """It measures perplexities on it, and opens the untouched model through it."""
        return True

    @property
    def data_items(self) -> int:
        """How many items the perplexities are measured on."""
        return 16

    def check(self, plan: Plan) -> None:
        """Refuse models that do not generate, engines of another kind, what a variant cannot be, and a second one."""
        others = ("prompt_lookup", "prefix_cache", "chunked_prefill")
        refuse_other_engines(plan.subject, self.step().name, others)
        for way in self.ways:
            way.check(plan)

    def preview(self, subject: Subject) -> Subject:
        """Return this model beside its variants; with floats where it is not untouched any more."""
        known = [Variant(drop_layers=way.drop_layers) if subject.history else way for way in self.ways]
        beside = [way.of(deepcopy(subject.module)) for way in known]
        return replace(subject, module=Variants([subject.module, *beside]), history=(*subject.history, self.step()))

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Return this transform with the ways that keep the bound, and what was measured of them.

        Raises:
            TransformError: the model itself does not keep it, or no way does.
        """
        untouched, data = _untouched(data)
        if self.perplexities:
            return self
        base = _perplexity(untouched, data)
        own = _perplexity(module, data) / base
        if own > self.most_perplexity:
            raise TransformError(f"the model as it is has {own:.3f} times the untouched perplexity; raise most_perplexity, or change less")
        found = [_perplexity(way.of(deepcopy(untouched)), data) / base for way in self.ways]
        kept = [(way, ratio) for way, ratio in zip(self.ways, found, strict=True) if ratio <= self.most_perplexity]
        if not kept:
            told = ", ".join(f"{ratio:.3f}" for ratio in found)
            raise TransformError(f"the ways have {told} times the untouched perplexity; raise most_perplexity, or name others")
        return self.model_copy(update={"ways": tuple(way for way, _ in kept), "perplexities": (own, *(ratio for _, ratio in kept))})

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the model with its variants as one module."""
        untouched, _ = _untouched(data)
        return Variants([module, *(way.of(deepcopy(untouched)) for way in self.ways)])


def _untouched(data: Calibration | None) -> tuple[nn.Module, Calibration]:
    if data is None or data.untouched is None or not data.batches:
        raise TransformError(
            "adaptive makes its variants of the untouched model in a recipe; in training code use optkit.engines.AdaptiveEngine"
        )
    return data.untouched(), data


@torch.inference_mode()
def _perplexity(module: nn.Module, data: Calibration) -> float:
    with evaluating(module):
        losses = [float(next_token_loss(module, module(**batch, use_cache=False), batch)) for batch in data.batches]
    return math.exp(sum(losses) / len(losses))
