"""The contract of a transform: settings, a check on shapes, and a change of the module."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self, overload

from torch import nn

from optkit.core.errors import TransformError
from optkit.core.settings import Settings
from optkit.core.subject import Calibration, Execution, Step, Subject


class Stage(IntEnum):
    """The order in which transforms can follow one another; equal stages may repeat."""

    MERGE = 0
    PRUNE = 1
    FACTORIZE = 2
    DISTILL = 3
    QUANTIZE = 4
    RUNTIME = 5
    PARALLEL = 6


@dataclass(frozen=True)
class Plan:
    """What a check may look at: the model's shapes (on the meta device) and how it will be measured."""

    subject: Subject
    batch_sizes: tuple[int, ...] = (1,)
    threads: int = 1


class Transform(Settings):
    """One step of a recipe: frozen settings with ``check`` and ``apply``."""

    stage: ClassVar[Stage]
    execution: ClassVar[Execution] = "real"
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "optkit"
    not_for_modules: ClassVar[str] = ""  # why a bare module cannot have it, and what to do instead

    @property
    def needs_data(self) -> bool:
        """Whether ``change`` looks at calibration data."""
        return False

    @property
    def data_items(self) -> int:
        """How many items of calibration data ``change`` would like to see, where it needs data."""
        return 32

    @property
    def processes(self) -> int:
        """How many processes ``change`` is done by together."""
        return 1

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Look at shapes only, change nothing.

        Raises:
            TransformError: it cannot work; the message names the layer, the number and the fix.
            TargetError: a pattern matches nothing.
        """

    @abstractmethod
    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the changed module. The given one is used up: its layers may be replaced in place."""

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Return this transform with its choices, made by a look at module and data, written into its settings; a history records it so.

        Override it where there is a choice that a user may want to read, or to repeat without the data.
        """
        return self

    def preview(self, subject: Subject) -> Subject:
        """Return the subject as it would look afterwards, on the meta device. Override where ``change`` needs data."""
        return self.apply(subject)

    @overload
    def apply(self, model: Subject, data: Calibration | None = None) -> Subject: ...
    @overload
    def apply(self, model: nn.Module, data: Calibration | None = None) -> nn.Module: ...
    def apply(self, model: Subject | nn.Module, data: Calibration | None = None) -> Subject | nn.Module:
        """Return the model with this transform applied; a subject's history grows by one step.

        The given module is used up: its layers may be replaced in place.

        Raises:
            TransformError: it cannot be applied; among others, a bare module has no engine and no place to choose.
        """
        if isinstance(model, nn.Module) and self.not_for_modules:
            raise TransformError(self.not_for_modules)
        if isinstance(model, nn.Module):
            return self.change(model, data)
        decided = self.decide(model.module, data)
        changed = decided.change(model.module, data)
        return replace(model, module=changed, history=(*model.history, decided.step()))

    def step(self) -> Step:
        """Return this transform as an entry of a history."""
        return Step(name=name_of(type(self)), settings=self.model_dump(mode="json"), execution=self.execution, opens_in=self.opens_in)


def name_of(kind: type[Any]) -> str:
    """Return a class's name as it is written in recipes: snake case, so ``DropLayers`` is ``drop_layers``."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")
