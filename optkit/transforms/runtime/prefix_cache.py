"""Equal beginnings of prompts computed once: a shared instruction costs its time with the first request alone."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.reusing import refusal
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.runtime.own_forward import refuse_other_engines


class PrefixCache(Transform):
    """Keep the keys and values of the last prompts (as in Zheng et al. 2023, arXiv 2312.07104); later ones begin where they differ.

    What it buys hangs on the prompts: ``latency: {shared_tokens: ...}`` measures requests that begin alike and go on differently.
    """

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "prefix_cache chooses the cache of a subject, and a bare module has none; generate with optkit.engines.ReusingEngine"
    )
    entries: Annotated[int, Field(ge=1, le=10_000)] = Field(default=8, description="prompts that are kept; those used last stay")
    least: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=16, description="positions that a shared beginning has at least")

    def check(self, plan: Plan) -> None:
        """Refuse models whose past is not keys and values of all positions, and a second prefix cache."""
        refuse_other_engines(plan.subject, self.step().name)
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}; leave prefix_cache out")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
