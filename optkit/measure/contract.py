"""The contract of a meter: something that measures an arm. Timed meters work in short blocks, so that arms can take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Subject


class Judge(Protocol):
    """The part of a task that meters use."""

    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Judge the subject, perhaps against what another left in ``reference``."""

    def metrics(self) -> tuple[Metric, ...]:
        """Return what is made of the judgement."""

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        """Return (count, length) input ids."""

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        """Return the inputs of one forward pass."""


@dataclass(frozen=True)
class Opened:
    """An arm as a meter sees it: the subject with the engine that runs it, and the task it is for."""

    subject: Subject
    engine: Any
    task: Judge


class Session(Protocol):
    """A timed measurement in progress. Each call of ``block`` does the next piece of work and returns its times in ms."""

    def block(self) -> Mapping[str, list[float]]:
        """Do the next piece of work; return times in ms by column."""


class Meter(Settings):
    """Settings of one kind of measurement."""

    timed: ClassVar[bool] = False
