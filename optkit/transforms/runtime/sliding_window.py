"""A cache of the first and the last positions: memory and time of a token stop growing with the text; what lies between is forgotten."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.native import refuse_compiled_window
from optkit.engines.sliding_window import refusal
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.runtime.own_forward import refuse_other_engines


class SlidingWindow(Transform):
    """Let each position see the last ones and the first few (as in Xiao et al. 2023, arXiv 2309.17453), and be judged by it."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "sliding_window chooses the cache of a subject, and a bare module has none; generate with optkit.engines.SlidingWindowEngine"
    )
    positions: Annotated[int, Field(ge=1, le=10_000_000)] = Field(default=256, description="last positions that are seen, itself included")
    sinks: Annotated[int, Field(ge=0, le=1_000_000)] = Field(default=4, description="first positions that are always seen")

    def check(self, plan: Plan) -> None:
        """Refuse models whose past cannot be cut, engines with a cache of their own, graphs that keep all, and a second one."""
        refuse_other_engines(plan.subject, self.step().name, ("prompt_lookup", "prefix_cache", "chunked_prefill"))
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}; leave sliding_window out")
        compiled = next((step.settings for step in plan.subject.history if step.name == "compile"), None)
        if compiled is not None:
            refuse_compiled_window(plan.subject.module, compiled["backend"])

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
