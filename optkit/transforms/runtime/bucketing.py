"""Batches without their padding: items of about one length are computed together."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.bucketed import refusal
from optkit.transforms.contract import Plan, Stage, Transform


class Bucketing(Transform):
    """Cut each item of a batch to its length, rounded up, and compute those of one length together; the answers stay the same.

    What it buys hangs on how uneven the items of a task are. Single items lose their padding too.
    """

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "bucketing chooses how a subject is given its batches, and a bare module is given them; use optkit.engines.BucketedForward"
    )
    multiple: Annotated[int, Field(ge=1, le=65_536)] = Field(default=16, description="lengths are rounded up to a multiple of this")

    def check(self, plan: Plan) -> None:
        """Refuse models whose answers would change, those that generate, and a second one."""
        if any(step.name == self.step().name for step in plan.subject.history):
            raise TransformError("bucketing stands there already; name it once")
        self._refuse(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        self._refuse(module)
        return module

    def _refuse(self, module: nn.Module) -> None:
        reason = refusal(module)
        if reason is not None:
            raise TransformError(f"{reason}; leave bucketing out")
