"""Serving from less memory than the weights take: what does not fit is read from disk at every use, which costs much time.

Preparing still takes the whole model in memory; so does the comparison with the untouched one.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Execution
from optkit.engines.offloading import bytes_by_place, placement, refusal
from optkit.transforms.contract import Plan, Stage, Transform

Size = Annotated[ByteSize, Field(gt=0)]
_ENGINES = ("compile", "kv_cache")


class Offload(Transform):
    """Keep the first layers on the accelerator, the next in host memory and the rest on disk, by accelerate's ``dispatch_model``."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    execution: ClassVar[Execution] = "neutral"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "offload says where a saved model's layers are kept, and a bare module has no file to read them from; use accelerate.dispatch_model"
    )
    host_memory: Size | None = Field(
        default=None, description="most bytes of weights in host memory, such as 500MB; the layer being read counts; default: what is free"
    )
    device_memory: Size | None = Field(default=None, description="the same of a CUDA device; default: nine tenths of what is free there")

    def check(self, plan: Plan) -> None:
        """Refuse packed layers, a second offload, engines that read all weights in place, and a memory in which everything fits.

        Raises:
            TransformError: with the numbers.
        """
        names = {step.name for step in plan.subject.history}
        if self.step().name in names:
            raise TransformError("the layers have their places already; name offload once")
        reason = refusal(plan.subject.module)
        if reason is not None:
            raise TransformError(f"{reason}; leave out offload, or what packs it")
        taken = sorted(names.intersection(_ENGINES))
        if taken:
            raise TransformError(f"{taken[0]} reads every weight where it is, and offload moves them; leave out one")
        if self.host_memory is not None and self.device_memory is None:
            found = bytes_by_place(plan.subject.module, placement(plan.subject.module, self.host_memory, None))
            if not found.get("disk"):
                raise TransformError(f"all {found['cpu'] / 1e6:.1f} MB of weights fit into host_memory; leave out offload, or give less")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is: its layers take their places when the artefact is opened."""
        return module
