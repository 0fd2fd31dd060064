"""What tasks with right answers share: four sides of data, batches for models that run forward, a loss to train by, rows to judge by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optkit.core.group import Group
from optkit.core.measurement import Samples
from optkit.core.subject import Calibration, Subject
from optkit.data.sides import Side, Sides
from optkit.tasks.contract import DataCard, Task

ANSWERS = "answers"  # the name of the right answers in a batch to train on
_BATCH = 32
_KEPT = "answers.safetensors"


@dataclass(frozen=True)
class Examples:
    """Items as tensors; the first axis of all counts the items."""

    inputs: Mapping[str, Tensor]
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def batches(self, rows: slice = slice(None)) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Yield inputs and answers of the items in some rows, a few at once."""
        mine = {name: tensor[rows] for name, tensor in self.inputs.items()}
        answers = self.answers[rows]
        for start in range(0, len(answers), _BATCH):
            here = slice(start, start + _BATCH)
            yield {name: tensor[here] for name, tensor in mine.items()}, answers[here]


class Supervised(Task):
    """A task whose items have right answers. Training, validation, calibration and evaluation share no item.

    ``only_judging`` names the settings that have no part in training: a network that was trained without them is the same.
    """

    only_judging: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def read(self) -> Sides[Any]:
        """Return the items.

        Raises:
            DataError: there are none, or one is broken; file and row are named.
        """

    @abstractmethod
    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return the items of a side as a model takes them."""

    @abstractmethod
    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return what a model for this task must have, by the words of its network: numbers of labels or channels, names, lengths."""

    @abstractmethod
    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the mean loss of a batch."""

    @abstractmethod
    def judge(self, output: Any, answers: Tensor) -> dict[str, Tensor]:
        """Return columns that ``metrics`` reads, a row an item; ``answer`` is what was answered, to be compared with the baseline's."""

    @abstractmethod
    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return the name of an answer that takes no model, and its columns: what a model must beat."""

    @cached_property
    def sides(self) -> Sides[Any]:
        """The items, read once."""
        return self.read()

    def look(self) -> None:
        """Read the items: what is broken in them is found before anything begins."""
        self.sides.checked()

    def card(self, subject: Subject) -> DataCard:
        """Describe the evaluated items."""
        sizes = {f"{side}_items": len(self.sides.of(side)) for side in ("training", "validation", "calibration")}
        return DataCard(self.word(), self.sides.name, self.sides.sha256("evaluation"), len(self.sides.evaluation), sizes)

    def calibration(self, subject: Subject, items: int = 32) -> Calibration:
        """Return the inputs of calibration items, evenly spread over them, in batches of 32; for more, those of training items too."""
        found = self.examples("calibration", subject.tokenizer)
        batches = _spread(found, items)
        if items > len(found):
            batches += _spread(self.examples("training", subject.tokenizer), items - len(found))
        return Calibration(tuple(batches))

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return the columns of ``judge`` for a batch: of what one forward pass gives."""
        return self.judge(engine.forward(inputs), answers)

    @torch.inference_mode()
    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Return the columns of ``judge`` over all evaluated items; against the baseline also whether it gave the same answer."""
        found = self.examples("evaluation", subject.tokenizer)
        parts: dict[str, list[Any]] = {}
        for inputs, answers in found.batches(group.rows(len(found))):
            for name, column in self.judged(subject, engine, inputs, answers).items():
                parts.setdefault(name, []).extend(column.tolist())
        joined = group.join([parts])
        columns = {name: np.array([value for part in joined for value in part[name]], dtype=np.float64) for name in joined[0]}
        if keep is not None and group.rank == 0:
            save_file({"answer": torch.from_numpy(columns["answer"])}, keep / _KEPT)
        if reference is not None:
            before = load_file(reference / _KEPT)["answer"].numpy()
            same = np.isclose(before, columns["answer"]).reshape(len(before), -1)
            columns["same"] = same.mean(1).astype(np.float64)
        return {name: column for name, column in columns.items() if name != "answer" or column.ndim == 1}

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        """Return the inputs of evaluated items, from the beginning, repeated where there are fewer."""
        found = self.examples("evaluation", subject.tokenizer).inputs
        return {name: tensor.repeat(-(-size // len(tensor)), *[1] * (tensor.ndim - 1))[:size] for name, tensor in found.items()}

    @classmethod
    def word(cls) -> str:
        """Return the task's name in recipes."""
        from optkit.tasks import TASKS

        return next(name for name in TASKS if TASKS[name] is cls)


def _spread(found: Examples, items: int) -> list[Mapping[str, Tensor]]:
    """Return the inputs of at most so many items, evenly spread, in batches."""
    chosen = torch.linspace(0, len(found) - 1, min(items, len(found))).round().long()
    inputs = {name: tensor[chosen] for name, tensor in found.inputs.items()}
    return [batch for batch, _ in Examples(inputs, found.answers[chosen]).batches()]


def logits_of(output: Any) -> Tensor:
    """Return the answers of a model: its logits, or the tensor that it returns."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found
