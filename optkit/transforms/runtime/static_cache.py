"""Room for keys and values taken beforehand: what a growing cache copies for each token is no longer copied."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.reusing import refusal
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.runtime.own_forward import refuse_other_engines


class StaticCache(Transform):
    """Write keys and values into a room of fixed size, which doubles when it is full; the tokens stay the same."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "static_cache chooses the cache of a subject, and a bare module has none; generate with optkit.engines.StaticCacheEngine"
    )
    positions: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="positions to make room for; default: the prompt's and as many again"
    )

    def check(self, plan: Plan) -> None:
        """Refuse models whose past is not keys and values of all positions, engines with a cache of their own, and a second one."""
        others = ("compile", "prompt_lookup", "prefix_cache", "chunked_prefill")
        refuse_other_engines(plan.subject, self.step().name, others)
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}; leave static_cache out")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
