"""Which layers a transform touches: include and exclude patterns over module names. A pattern that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import Field

from optkit.core.errors import TargetError
from optkit.core.registry import did_you_mean
from optkit.core.settings import Settings


class Targets(Settings):
    """Shell patterns over dotted module names; a pattern without a dot also matches the last part of a name."""

    include: tuple[str, ...] = Field(default=("*",), description="patterns of layers to change")
    exclude: tuple[str, ...] = Field(default=(), description="patterns of layers to leave alone")

    def select(self, names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Return the names that an include pattern matches and no exclude pattern does.

        Args:
            names: the layers that can be selected.
            others: layers that never are, but that an exclude pattern may name without matching nothing.

        Raises:
            TargetError: a pattern matches none of the names, or nothing is left.
        """
        known, spared = list(names), list(others)
        if not known:
            raise TargetError("there is no layer to change: the model has no linear layers, or all of them are packed already")
        for pattern in (*self.include, *self.exclude):
            if not any(matches(pattern, name) for name in (known if pattern in self.include else known + spared)):
                shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
                last_parts = sorted({name.rpartition(".")[2] for name in known})
                raise TargetError(
                    f"pattern {pattern!r} matches none of the {len(known)} layers ({shown}){did_you_mean(pattern, last_parts)}"
                )
        kept = [
            name
            for name in known
            if any(matches(pattern, name) for pattern in self.include) and not any(matches(pattern, name) for pattern in self.exclude)
        ]
        if not kept:
            raise TargetError(f"include {list(self.include)} without exclude {list(self.exclude)} leaves none of the {len(known)} layers")
        return kept


def matches(pattern: str, name: str) -> bool:
    """Say whether a pattern matches a dotted name, or, for a pattern without a dot, its last part."""
    return fnmatchcase(name, pattern) or ("." not in pattern and fnmatchcase(name.rpartition(".")[2], pattern))
