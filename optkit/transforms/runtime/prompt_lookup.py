"""Several tokens a forward where the text repeats itself: code, summaries, answers that quote. The tokens stay the same."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.reusing import refusal
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.runtime.own_forward import refuse_other_engines


class PromptLookup(Transform):
    """Guess the next tokens from where the last ones stood before, and check all guesses by one forward; for single sequences.

    Guesses: Saxena 2023 (https://github.com/apoorvumang/prompt-lookup-decoding); the check: Leviathan et al. 2022 (arXiv 2211.17192).
    """

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "prompt_lookup chooses the engine of a subject, and a bare module has none; generate with optkit.engines.SpeculativeEngine"
    )
    tokens: Annotated[int, Field(ge=1, le=256)] = Field(default=6, description="tokens that are guessed at once, at most")
    longest_match: Annotated[int, Field(ge=1, le=64)] = Field(default=3, description="last tokens that must have stood before, at most")

    def check(self, plan: Plan) -> None:
        """Refuse models whose cache cannot be cut back, compiled steps, and a second one."""
        refuse_other_engines(plan.subject, self.step().name, ("compile",))
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}, and a wrong guess must be taken back; leave prompt_lookup out")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
