"""Data from Python, copied to the kinds that a recipe file could hold. Objects, endless numbers and circles are refused by place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optkit.recipe.scalars import MOST_DIGITS, forbidden_character
from optkit.recipe.strict_yaml import MOST_DEPTH, MOST_VALUES
from optkit.recipe.trail import Fault, Trail, quoted, shown


def plain_data(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Return a deep copy of ``data`` as dict, list, text, numbers, true, false and None, and what cannot be copied."""
    if not isinstance(data, Mapping):
        return {}, [Fault((), f"expected a mapping with keys such as 'name', got {shown(data)}")]
    copier = _Copier()
    copied = copier.copy(data, ())
    return copied, copier.faults


class _Copier:
    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._values = 0

    def copy(self, value: Any, trail: Trail) -> Any:
        self._values += 1
        if self._values > MOST_VALUES or len(trail) > MOST_DEPTH:
            if self._values == MOST_VALUES + 1 or len(trail) > MOST_DEPTH:
                self._fault(trail[:4], f"more than {MOST_VALUES:,} values or {MOST_DEPTH} levels; a recipe is small")
            return None
        if isinstance(value, Mapping):
            return {key: self.copy(inner, (*trail, key)) for key, inner in value.items() if self._is_key(key, trail)}
        if isinstance(value, list | tuple):
            return [self.copy(inner, (*trail, position)) for position, inner in enumerate(value)]
        reason = _refuse(value)
        if reason:
            self._fault(trail, reason)
            return None
        return value

    def _is_key(self, key: Any, trail: Trail) -> bool:
        if isinstance(key, str) and key and not forbidden_character(key):
            return True
        self._fault(trail, f"a key must be text, got {quoted(key) if isinstance(key, str) else shown(key)}")
        return False

    def _fault(self, trail: Trail, message: str) -> None:
        self.faults.append(Fault(trail, message))


def _refuse(value: Any) -> str | None:
    """Say why a single value cannot stand in a recipe, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        found = forbidden_character(value)
        return f"the character {found[1]} is not allowed; remove it" if found else None
    if isinstance(value, int):
        return f"a whole number has at most {MOST_DIGITS} digits" if abs(value) >= 10**MOST_DIGITS else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"expected a number, got {value}"
    return f"expected plain data, got {shown(value)}"
