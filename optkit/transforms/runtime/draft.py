"""Several tokens a forward, guessed by a quicker model: a variant of this one, or another. The tokens stay those of this one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from optkit.core.errors import OptkitError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines.reusing import refusal
from optkit.engines.variants import Variants
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.merge.ensemble import vocabulary_of
from optkit.transforms.runtime.own_forward import refuse_other_engines
from optkit.transforms.runtime.variant import Variant


class Draft(Transform):
    """Let a quicker model guess the next tokens, and check all guesses by one forward; for single sequences.

    Source: Leviathan et al. 2022 (arXiv 2211.17192), for greedy choices. Where the kernels know the model that guesses, its steps run in
    them; a variant of the same model in fewer bits guesses well (as in Zhang et al. 2023, arXiv 2309.08168, with fewer layers).
    """

    stage: ClassVar[Stage] = Stage.RUNTIME
    not_for_modules: ClassVar[str] = (
        "draft chooses the engine of a subject, and a bare module has none; generate with optkit.engines.DraftEngine"
    )
    model: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="another model that guesses: a folder, or a name of the Hub; default: the variant"
    )
    variant: Variant | None = Field(default=None, description="what is done to the untouched model, so that it guesses; default: bits: 4")
    tokens: Annotated[int, Field(ge=1, le=256)] = Field(default=6, description="tokens that are guessed at once, at most")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.model is not None and self.variant is not None:
            raise OptkitError("model and variant are both named, and only one can guess; leave out one")
        return self

    @property
    def needs_data(self) -> bool:
        """It opens the other model through it."""
        return True

    @property
    def data_items(self) -> int:
        """It looks at none."""
        return 1

    def check(self, plan: Plan) -> None:
        """Refuse models whose cache cannot be cut back, compiled steps, what a variant cannot be, and a second one."""
        refuse_other_engines(plan.subject, self.step().name, ("compile", "prompt_lookup", "prefix_cache", "chunked_prefill"))
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}, and a wrong guess must be taken back; leave draft out")
        if self.model is None:
            self._variant.check(plan)

    def preview(self, subject: Subject) -> Subject:
        """Return this model beside its variant; beside itself where another guesses, whose shapes are only known when it is opened."""
        known = Variant(drop_layers=self._variant.drop_layers) if subject.history else self._variant  # bits are for untouched weights
        beside = known.of(deepcopy(subject.module)) if self.model is None else subject.module
        return replace(subject, module=Variants([subject.module, beside]), history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return both as one module.

        Raises:
            TransformError: the other cannot be opened here, is no causal language model, or knows other tokens.
        """
        if data is None or data.untouched is None or data.open_model is None:
            raise TransformError("draft opens its model in a recipe; in training code use optkit.engines.DraftEngine")
        other = self._variant.of(data.untouched()) if self.model is None else data.open_model(self.model)
        known, mine = vocabulary_of(other, str(self.model)), vocabulary_of(module, "this model")
        if known != mine:
            raise TransformError(f"model {self.model!r} knows {known} tokens and this one {mine}: it cannot guess for it")
        reason = refusal(other)
        if reason is not None:
            raise TransformError(f"{reason}, and a wrong guess must be taken back; let another model guess")
        return Variants([module, other])

    @property
    def _variant(self) -> Variant:
        return self.variant or Variant(bits=4)
