"""The blocks shared by several processes, one after another: more throughput for batches, no faster single request."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Calibration
from optkit.engines.parallel.balance import balanced, step_times
from optkit.engines.parallel.cut import cut, hollow
from optkit.engines.parallel.part import Part
from optkit.engines.parallel.rehearsal import rehearse
from optkit.engines.parallel.stages import block_list, bounds_of
from optkit.transforms.contract import Plan
from optkit.transforms.layers import is_on_meta
from optkit.transforms.parallel.contract import Parallel, Role
from optkit.transforms.parallel.tensor_parallel import refuse_other_kinds


class PipelineParallel(Parallel):
    """Give each of ``size`` processes some blocks; micro-batches keep all of them at work (Huang et al. 2019, arXiv 1811.06965).

    Stages are balanced by the measured time of the blocks, the embedding and the head. Their parts are held to the answers of the whole
    before it is saved.
    """

    role: ClassVar[Role] = "pipeline"
    micro_batches: Annotated[int, Field(ge=1, le=4096)] = Field(default=8, description="parts of a batch that follow one another")
    rows: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=32, description="sequences of a micro-batch by whose time the stages are balanced: the head's share grows with them"
    )
    stages: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="blocks of each stage; default: balanced by measured time"
    )

    def check(self, plan: Plan) -> None:
        """Refuse more stages than blocks, counts that do not add up, and models with parts whose stage is not known."""
        super().check(plan)
        refuse_other_kinds(plan.subject, self.step().name)
        bounds_of(len(block_list(plan.subject.module)[1]), self.size, self.stages)
        for rank in range(self.size):
            cut(hollow(plan.subject.module), Part(Mesh(pipeline=self.size), Mesh(pipeline=self.size).place(rank), stages=self.stages))
        if max(plan.batch_sizes) < self.size:
            raise TransformError(
                f"{self.size} stages would wait for one another with batches of {max(plan.batch_sizes)}; "
                f"measure.latency.batch_sizes needs one of at least {self.size}"
            )

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Balance the stages, and hold the parts to the answers of the whole.

        Raises:
            TransformError: they answer otherwise.
        """
        if is_on_meta(module):
            return self
        stages = self.stages or balanced(step_times(module, self.rows), self.size)
        rehearse(module, Mesh(pipeline=self.size), stages)
        return self.model_copy(update={"stages": stages})
