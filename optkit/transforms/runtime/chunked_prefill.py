"""Long prompts in pieces: what a forward holds at once no longer grows with the prompt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.subject import Calibration, Execution
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.runtime.own_forward import refuse_other_engines


class ChunkedPrefill(Transform):
    """Compute a prompt piece by piece (as in Agrawal et al. 2023, arXiv 2308.16369); less memory, and about the same time."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    execution: ClassVar[Execution] = "neutral"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "chunked_prefill tells an engine how to take prompts, and a bare module has none; generate with optkit.engines.ReusingEngine"
    )
    tokens: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=256, description="positions that are computed at once")

    def check(self, plan: Plan) -> None:
        """Refuse subjects that take no prompts, and a second one."""
        refuse_other_engines(plan.subject, self.step().name)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
