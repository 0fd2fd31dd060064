"""Lets several models answer together, by the mean of their logits. It costs the time and the memory of all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines.ensemble import Members
from optkit.transforms.contract import Plan, Stage, Transform

Spec = Annotated[str, Field(min_length=1, max_length=1000)]


class Ensemble(Transform):
    """Causal language models of one vocabulary, of any shapes, side by side."""

    stage: ClassVar[Stage] = Stage.MERGE
    models: tuple[Spec, ...] = Field(min_length=1, max_length=16, description="the others: folders, or names of the Hub")

    @property
    def needs_data(self) -> bool:
        """It opens the others through it."""
        return True

    @property
    def data_items(self) -> int:
        """It looks at none."""
        return 1

    def check(self, plan: Plan) -> None:
        """Refuse models that do not generate."""
        if plan.subject.kind != "causal-lm":
            raise TransformError(f"an ensemble is made of causal language models, and {type(plan.subject.module).__name__} is none")

    def preview(self, subject: Subject) -> Subject:
        """Return this model beside itself: the others' shapes are only known when they are opened."""
        together = Members([subject.module] * (1 + len(self.models)))
        return replace(subject, module=together, history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return all of them as one module.

        Raises:
            TransformError: the others cannot be opened here, are no causal language models, or know other tokens.
        """
        if data is None or data.open_model is None:
            raise TransformError("ensemble opens its models in a recipe; in training code use optkit.engines.ensemble.Members(models)")
        members = [module, *(data.open_model(spec) for spec in self.models)]
        vocabulary = vocabulary_of(module, "this model")
        for spec, other in zip(self.models, members[1:], strict=True):
            if vocabulary_of(other, spec) != vocabulary:
                known = vocabulary_of(other, spec)
                raise TransformError(f"model {spec!r} knows {known} tokens and this one {vocabulary}: they cannot answer together")
        return Members(members)


def vocabulary_of(module: Any, name: str) -> int:
    """Return how many tokens a causal language model knows.

    Raises:
        TransformError: it is none.
    """
    generates = getattr(module, "can_generate", None)
    if not callable(generates) or not generates():
        raise TransformError(f"{name} is no causal language model ({type(module).__name__}): it has no logits of next tokens")
    size: int = module.config.vocab_size
    return size
