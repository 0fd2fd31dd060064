"""Items with right answers, parted into four sides that share nothing: training, validation, calibration and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args

from optkit.core.errors import DataError

Side = Literal["training", "validation", "calibration", "evaluation"]
SIDES: tuple[Side, ...] = get_args(Side)
T = TypeVar("T", bound=Hashable)
_SIXTEENTHS: tuple[tuple[Side, int], ...] = (("evaluation", 3), ("calibration", 2), ("validation", 1), ("training", 10))


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Tagged:
    """Words, and a tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A text, and the answers that are right: the first is the one to learn.

    Where the text is a question on another one, that is the ``context``, and the first answer stands there from character ``start`` on.
    """

    text: str
    answers: tuple[str, ...]
    context: str = ""
    start: int = -1

    @property
    def whole(self) -> str:
        """The text with its context."""
        return f"{self.text} {self.context}" if self.context else self.text


@dataclass(frozen=True)
class Window:
    """A stretch of a series: its first day, and the values of each day."""

    begins: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Sides(Generic[T]):
    """The items of each side, in order. ``further`` reads more to learn from, when that side is asked for first."""

    name: str
    training: list[T] = field(default_factory=list)
    validation: list[T] = field(default_factory=list)
    calibration: list[T] = field(default_factory=list)
    evaluation: list[T] = field(default_factory=list)
    further: list[Callable[[], Iterable[T]]] = field(default_factory=list)

    def of(self, side: Side) -> list[T]:
        """Return the items of a side."""
        while side == "training" and self.further:
            self.training.extend(self.further.pop()())
        found: list[T] = getattr(self, side)
        return found

    def sha256(self, side: Side) -> str:
        """Return a digest of the items of a side, in order."""
        whole = hashlib.sha256()
        for item in self.of(side):
            whole.update(hashlib.sha256(repr(item).encode()).digest())
        return whole.hexdigest()

    def checked(self) -> Sides[T]:
        """Return the sides.

        Raises:
            DataError: one of them has nothing.
        """
        sizes: dict[Side, int] = {side: len(getattr(self, side)) for side in SIDES}
        if not all(sizes.values()):
            counts = ", ".join(f"{side} {size}" for side, size in sizes.items())
            raise DataError(f"corpus {self.name!r} has too little for four sides ({counts}); give more")
        return self


def side_of(key: str) -> Side:
    """Return the side of whatever has this name, by a hash of it: the same on every machine, whatever else there is."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 16
    for side, share in _SIXTEENTHS:
        if bucket < share:
            return side
        bucket -= share
    raise AssertionError("shares make sixteen")


def shares_of(sizes: Mapping[str, int]) -> dict[str, Side]:
    """Return a side for each of some groups, such as files, so that the sides come near their shares of all items.

    The largest group goes first, each to the side that lacks most; equal ones by their names. Where items are few and groups uneven, a
    hash of the names would leave sides empty.
    """
    total = sum(sizes.values())
    lacks = {side: share * total / 16 for side, share in reversed(_SIXTEENTHS)}
    found: dict[str, Side] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        side = max(lacks, key=lambda side: lacks[side])
        found[name] = side
        lacks[side] -= sizes[name]
    return found


def stretched(name: str, texts: Iterable[str]) -> Sides[str]:
    """Cut each of a few long texts into a stretch a side, at ends of lines where there are some: training first, evaluation last.

    Raises:
        DataError: a side has nothing.
    """
    sides: Sides[str] = Sides(name)
    for text in texts:
        start = done = 0
        for side, share in reversed(_SIXTEENTHS):
            done += share
            wanted = len(text) * done // 16
            end = text.find("\n", wanted) + 1 or wanted
            end = len(text) if done == 16 else max(start, min(end, len(text)))
            if text[start:end].strip():
                sides.of(side).append(text[start:end])
            start = end
    return sides.checked()


def parted(name: str, keyed: Iterable[tuple[str, T]]) -> Sides[T]:
    """Part items by their keys; equal keys stand on one side, and equal items count once.

    Raises:
        DataError: a side has nothing.
    """
    sides: Sides[T] = Sides(name)
    for key, item in dict((item, (key, item)) for key, item in keyed).values():
        sides.of(side_of(key)).append(item)
    return sides.checked()
