"""All refusals, as one family. Each knows its exit code and prints as plain sentences, never as a traceback.

OptkitError (2)
├── ProblemsError        several problems of one file, found in one go
├── TargetError          a pattern that selects nothing, a layer that cannot be changed
├── TransformError       a transform that cannot work on this model
├── ModelError           a model that cannot be opened
├── DataError            data that cannot be read or used
├── ArtefactError        a saved artefact or result that is incomplete or changed
├── PlaceError           a file or folder that cannot be written where it was asked for
├── MissingError (3)     a package or device that is not here
├── ResourceError (4)    memory or disk
├── ArmError (70)        a measuring process that failed
└── StoppedError (130)   ended by a signal
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class OptkitError(Exception):
    """The root of all refusals: bad input, said plainly."""

    exit_code = 2


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong in a file: where, what, and what to do.

    ``line`` counts from 1; 0 means the file as a whole. ``path`` is the place inside the document, such as ``transforms[0].int4``.
    """

    line: int
    path: str
    message: str


class ProblemsError(OptkitError):
    """All problems of one file at once."""

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems))
        count = len(self.problems)
        lines = [f"{file}: {count} problem{'s' if count != 1 else ''}"]
        width = max((len(problem.path) for problem in self.problems), default=0)
        for problem in self.problems:
            place = f"line {problem.line}" if problem.line else "file"
            lines.append(f"  {place:<8}  {problem.path:<{width}}  {problem.message}")
        super().__init__("\n".join(lines))


class TargetError(OptkitError):
    """A pattern matches nothing, or names a layer that cannot be changed."""


class TransformError(OptkitError):
    """A transform cannot work on this model; names the layer, the number and the fix."""


class ModelError(OptkitError):
    """A model cannot be found or opened."""


class DataError(OptkitError):
    """Data cannot be read, or is not enough."""


class ArtefactError(OptkitError):
    """A saved artefact or result is incomplete, changed, or of another version."""


class PlaceError(OptkitError):
    """Nothing can be written at a place: it is read-only, forbidden, or something stands in the way."""


class MissingError(OptkitError):
    """A package or a device is not here; the message says how to get it."""

    exit_code = 3


class ResourceError(OptkitError):
    """Memory or disk space was not enough."""

    exit_code = 4


class ArmError(OptkitError):
    """A measuring process died, hung or failed."""

    exit_code = 70


class StoppedError(OptkitError):
    """The run was ended by a signal; what was finished is kept."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OptkitWarning(UserWarning):
    """Something was done otherwise than asked for, and why. In training code a Python warning; a run writes it into its report."""


@contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Give the text of every ``OptkitWarning`` to a function; other warnings go their way."""
    show = warnings.showwarning

    def hand_on(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, OptkitWarning):
            tell(str(message))
        else:
            show(message, category, *rest, **named)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OptkitWarning)
        warnings.showwarning = hand_on
        yield
