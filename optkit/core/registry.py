"""One registry for all extension points: names map to classes that are imported when they are first asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from optkit.core.errors import OptkitError

T = TypeVar("T")


class UnknownNameError(OptkitError):
    """A name that is not registered; the message suggests the nearest one."""


class Registry(Generic[T], Mapping[str, type[T]]):
    """Named classes of one kind.

    Entries are ``"package.module:Class"`` and are imported on use, so that listing names costs nothing. Installed packages add
    their own through the entry point group ``optkit.<kind>s``; a name of ours cannot be taken over.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._plugins_read = False

    def __getitem__(self, name: str) -> type[T]:
        self._read_plugins()
        if name not in self._entries:
            raise UnknownNameError(self.unknown(name))
        module, _, attribute = self._entries[name].partition(":")
        found: type[T] = getattr(import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(self._entries)

    def __len__(self) -> int:
        self._read_plugins()
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        return name in self._entries

    def unknown(self, name: str) -> str:
        """Return the message for a name that is not registered."""
        return f"unknown {self.kind} {name!r}{did_you_mean(name, self)}"

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        entries = dict(self._entries)
        for point in entry_points(group=f"optkit.{self.kind}s"):
            if point.name in entries:
                raise OptkitError(f"package {point.dist and point.dist.name!r} registers {self.kind} {point.name!r}, which exists already")
            entries[point.name] = point.value
        self._entries, self._plugins_read = entries, True


def did_you_mean(name: str, known: Mapping[str, object] | list[str]) -> str:
    """Return a hint such as ``; did you mean 'int8'?``, or the known names where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 24 else ""
