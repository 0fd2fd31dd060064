"""Several processes with a copy of the model each, sharing the requests. More throughput for batches; a single request gains nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, overload

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms.contract import Plan, Stage, Transform


class DataParallel(Transform):
    """Serve by ``size`` ranks; the requests of a batch are split among them in order, the remainder included."""

    stage: ClassVar[Stage] = Stage.PARALLEL
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    size: Annotated[int, Field(ge=2, le=64)] = Field(default=2, description="number of processes")

    def check(self, plan: Plan) -> None:
        """Refuse a second data_parallel, and batches that leave every rank but one without work."""
        if plan.subject.replicas > 1:
            raise TransformError(f"the model is data-parallel over {plan.subject.replicas} ranks already; name data_parallel once")
        if max(plan.batch_sizes) < self.size:
            raise TransformError(
                f"{self.size} ranks have no work with batches of {max(plan.batch_sizes)}; "
                f"measure.latency.batch_sizes needs one of at least {self.size}"
            )

    @overload
    def apply(self, model: Subject, data: Calibration | None = None) -> Subject: ...
    @overload
    def apply(self, model: nn.Module, data: Calibration | None = None) -> nn.Module: ...
    def apply(self, model: Subject | nn.Module, data: Calibration | None = None) -> Subject | nn.Module:
        """Return the subject, to be opened by a group of ranks.

        Raises:
            TransformError: a bare module was given; placement belongs to a subject.
        """
        if isinstance(model, Subject):
            return replace(model, replicas=self.size, history=(*model.history, self.step()))
        raise TransformError("data_parallel places a whole subject on several processes; a bare module has no place")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is: only its placement changes."""
        return module
