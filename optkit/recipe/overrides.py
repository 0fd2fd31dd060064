"""`--set path=value`: one value of a recipe replaced from the command line. The value follows the rules of the recipe's own YAML."""

from __future__ import annotations

import re
from typing import Any

from optkit.recipe.schema import DEFAULT_METERS
from optkit.recipe.strict_yaml import MOST_DEPTH, parse_text
from optkit.recipe.trail import Fault, Place, Trail, dotted, forget, quoted, shown

_STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[([0-9]{1,6})\]")


def apply_override(data: dict[str, Any], places: dict[Trail, Place], text: str) -> Fault | None:
    """Put the value of ``path=value`` into the data and note its place; or return what is wrong with it and change nothing.

    Mappings that are missing on the way are made, and a bare name such as ``- int8`` becomes ``int8: {}`` where the path goes on.
    """
    path, equals, word = text.partition("=")
    steps = _steps(path.strip())
    if not equals or steps is None:
        return Fault((), f"--set {quoted(text)} is not of the form path=value, such as transforms[0].int4.group_size=32")
    if steps[0] == "extends":
        return Fault(("extends",), "extends cannot be set; write it into the recipe")
    document = parse_text(word)
    if document.faults:
        return Fault((), f"--set {quoted(text)}: {document.faults[0][1].message}")
    return _put(data, places, steps, document.data, Place(f"--set {quoted(text)}", 0))


def _steps(path: str) -> list[str] | None:
    found = list(_STEP.finditer(path))
    if not found or path.startswith(".") or "".join(step.group() for step in found) != path or len(found) > MOST_DEPTH:
        return None
    return [step.group(1) or step.group(2) for step in found]


def _put(data: dict[str, Any], places: dict[Trail, Place], steps: list[str], value: Any, place: Place) -> Fault | None:
    trail: Trail = ()
    here: Any = data
    for position, step in enumerate(steps):
        key = _key_in(here, step)
        if key is None:
            return Fault(trail, f"{place.source}: {_no_such(here, step, trail)}")
        trail = (*trail, key)
        if position == len(steps) - 1:
            here[key] = value
            forget(places, trail)
            places[trail] = place
        else:
            if _value(here, key) is None:
                places[trail] = place
            here = _opened(here, key, steps[position + 1], trail)
    return None


def _key_in(here: Any, step: str) -> str | int | None:
    if isinstance(here, dict):
        return step
    if isinstance(here, list) and step.isdecimal() and step.isascii() and int(step) < len(here):
        return int(step)
    return None


def _opened(here: Any, key: str | int, following: str, trail: Trail) -> Any:
    """Return what stands at ``key``, made a mapping where it is missing or is the bare name of what follows."""
    value = _value(here, key)
    if value is None and following.isdecimal():
        return None
    if value is None:
        here[key] = {name: {} for name in DEFAULT_METERS} if trail == ("measure",) else {}
    elif isinstance(value, str) and value == following:
        here[key] = {value: {}}
    return here[key]


def _value(here: Any, key: str | int) -> Any:
    return here.get(key) if isinstance(here, dict) else here[key]


def _no_such(here: Any, step: str, trail: Trail) -> str:
    if isinstance(here, list):
        positions = f"0 to {len(here) - 1}" if here else "none"
        return f"{dotted(trail)} is a list with positions {positions}, there is no {quoted(step)}"
    return f"{dotted(trail)} is {shown(here)}, there is nothing named {quoted(step)} in it"
