"""Where something stands in a recipe, and how places and values are shown in messages. It reads nothing itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Trail = tuple[str | int, ...]
"""The keys and positions that lead to a value, such as ``("transforms", 0, "int4")``."""

LONGEST_SHOWN = 60
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_@+-]+")


@dataclass(frozen=True)
class Fault:
    """One thing wrong at a place of the document."""

    trail: Trail
    message: str


@dataclass(frozen=True)
class Place:
    """Where a value was written. ``source`` is empty for the recipe itself, else the file it extends, or the override."""

    source: str
    line: int


def dotted(trail: Trail) -> str:
    """Return a trail as it is printed, such as ``transforms[0].int4``; odd keys are quoted and escaped."""
    text = ""
    for part in trail:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part) and len(part) <= LONGEST_SHOWN:
            text += f".{part}" if text else part
        else:
            text += f"[{quoted(part)}]"
    return text


def quoted(text: str) -> str:
    """Return a text in quotes, escaped and cut to a readable length."""
    return repr(text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "...")


def shown(value: Any) -> str:
    """Return a value as a user would write it, in short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, int | float):
        return str(value)
    return f"a Python {type(value).__name__}"


def value_at(data: Any, trail: Trail) -> Any:
    """Return the value at a trail, or None where there is none."""
    for part in trail:
        is_key = isinstance(data, dict) and part in data
        is_position = isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)
        if not (is_key or is_position):
            return None
        data = data[part]
    return data


def forget(places: dict[Trail, Place], trail: Trail) -> None:
    """Remove the places of a value and of all that was in it."""
    for known in [known for known in places if known[: len(trail)] == trail]:
        del places[known]
