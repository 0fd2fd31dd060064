"""The contract of a task: its data, the split into calibration and evaluation, and how answers are judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Calibration, Kind, Subject


@dataclass(frozen=True)
class DataCard:
    """What the data was, so that two results can be told apart: ``sha256`` covers the evaluated items themselves."""

    task: str
    corpus: str
    sha256: str
    items: int
    detail: Mapping[str, Any] = field(default_factory=dict)


class Task(Settings):
    """What a subject is for. Its calibration data never overlaps its evaluation data.

    ``kinds`` are those of the subjects that it can judge.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("module",)

    def withheld(self, subject: Subject) -> str | None:
        """Return why this subject's quality means nothing, or None where it can be judged."""
        return None if subject.trained else "the weights are random"

    def look(self) -> None:
        """Look for the data, without reading it.

        Raises:
            DataError: it is not there.
        """

    @abstractmethod
    def card(self, subject: Subject) -> DataCard:
        """Describe the evaluation data; reads the data, runs no model."""

    @abstractmethod
    def calibration(self, subject: Subject, items: int = 32) -> Calibration:
        """Return data for transforms that need to see some: so many items, or all where there are fewer."""

    @abstractmethod
    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Judge the subject. All ranks of a group call this together, and each gets the whole answer.

        Args:
            subject: the model, opened.
            engine: what executes it.
            group: the ranks that share the work.
            reference: a folder that ``keep`` of the baseline's evaluation filled, to compare answers with; None for the baseline.
            keep: an existing folder in which to leave what later evaluations compare with; None to leave nothing.

        Returns:
            columns whose first axis counts independent units of the data, as ``metrics`` reads them.
        """

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Return the quality metrics, the most important first."""

    @property
    def item_positions(self) -> int | None:
        """The positions of an item in a forward, padding included; None where the settings do not say."""
        return None

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        """Return ``(count, length)`` input ids for timing; real text where there is some. Only for causal language models."""
        raise TypeError(f"{type(self).__name__} has no prompts: its subjects do not generate")

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        """Return the keyword inputs of ``size`` items, for timing: of one forward pass, or of what an encoder reads."""
        raise TypeError(f"{type(self).__name__} has no batches: its subjects go on with prompts")
