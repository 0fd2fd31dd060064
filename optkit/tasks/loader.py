"""A task made in Python of batches and a score, for any module. It is not for recipes, because it holds code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.core.subject import Calibration, Subject
from optkit.tasks.contract import DataCard, Task

Batch = Mapping[str, Tensor]


class LoaderTask(Task):
    """Judges a module by the mean of a score over items.

    ``inputs`` names what of a batch the module is called with; ``score(output, batch)`` returns one number an item.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    batches: tuple[Batch, ...]
    calibration_batches: tuple[Batch, ...] = ()
    inputs: tuple[str, ...]
    score: Callable[[Any, Batch], Tensor]
    metric: str
    unit: str = ""
    higher_is_better: bool = True

    def card(self, subject: Subject) -> DataCard:
        """Describe the batches; their digest covers every tensor."""
        if not self.batches:
            raise DataError("the task has no batches to evaluate")
        whole = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                tensor = batch[name].detach().cpu().contiguous()
                whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return DataCard("loader", self.metric, whole.hexdigest(), sum(len(batch[self.inputs[0]]) for batch in self.batches))

    def calibration(self, subject: Subject, items: int = 32) -> Calibration:
        """Return all calibration batches, however many are asked for, reduced to the module's inputs."""
        return Calibration(tuple(self._of(batch) for batch in self.calibration_batches))

    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Return one score an item."""
        mine = self.batches[group.rows(len(self.batches))]
        scores = [self.score(engine.forward(self._of(batch)), batch).double().flatten().tolist() for batch in mine]
        joined = group.join([value for part in scores for value in part])
        return {"score": torch.tensor(joined, dtype=torch.float64).numpy()}

    def metrics(self) -> tuple[Metric, ...]:
        """Return the mean score."""
        return (Metric(self.metric, self.unit, self.higher_is_better, lambda c: c["score"].mean(-1), lambda c: c["score"]),)

    def batch(self, subject: Subject, size: int) -> Batch:
        """Return ``size`` items, from the beginning, repeated where there are fewer."""
        parts = [self._of(batch) for batch in self.batches]
        whole = {name: torch.cat([part[name] for part in parts]) for name in self.inputs}
        return {name: tensor.repeat(-(-size // len(tensor)), *[1] * (tensor.ndim - 1))[:size] for name, tensor in whole.items()}

    def _of(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in self.inputs}
