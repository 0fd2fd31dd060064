"""Several processes with a copy of the model each, sharing the requests. More throughput for batches; a single request gains nothing."""

from __future__ import annotations

from typing import ClassVar

from optkit.core.errors import TransformError
from optkit.transforms.contract import Plan
from optkit.transforms.parallel.contract import Parallel, Role


class DataParallel(Parallel):
    """Serve by ``size`` replicas; the requests of a batch are split among them in order, the remainder included."""

    role: ClassVar[Role] = "data"

    def check(self, plan: Plan) -> None:
        """Refuse a second data_parallel, and batches that leave every replica but one without work."""
        super().check(plan)
        if max(plan.batch_sizes) < self.size:
            raise TransformError(
                f"{self.size} ranks have no work with batches of {max(plan.batch_sizes)}; "
                f"measure.latency.batch_sizes needs one of at least {self.size}"
            )
