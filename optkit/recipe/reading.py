"""Recipe files to recipes, with what they extend and overrides; one error has all problems. Reads nothing outside the recipe's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from optkit.core.errors import Problem, ProblemsError
from optkit.core.registry import did_you_mean
from optkit.recipe.building import build_recipe
from optkit.recipe.overrides import apply_override
from optkit.recipe.plain_data import plain_data
from optkit.recipe.schema import Recipe
from optkit.recipe.strict_yaml import MOST_BYTES, parse_recipe
from optkit.recipe.trail import Fault, Place, Trail, dotted, forget, quoted, shown

MOST_EXTENDS = 8
MOST_PROBLEMS = 50


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and what it extends, apply overrides of the form ``path=value``, check it all.

    Raises:
        ProblemsError: everything that is wrong, with lines, places and remedies.
    """
    raw = _read(Path(path))
    if isinstance(raw, str):
        raise ProblemsError(os.fspath(path), [Problem(0, "", raw)])
    sheet = _load(Path(path), raw, Path(path).parent, ())
    if not sheet.broken:
        for text in overrides:
            fault = apply_override(sheet.data, sheet.places, text)
            if fault:
                sheet.faults.append((Place("", 0), fault))
    sheet.data.pop("extends", None)
    return _built(os.fspath(path), sheet)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Make a recipe of plain data: mappings, lists or tuples, text, numbers, true, false and None.

    Raises:
        ProblemsError: everything that is wrong, with places and remedies.
    """
    copy, faults = plain_data(data)
    return _built("recipe", _Sheet(copy, faults=[(Place("", 0), fault) for fault in faults], broken=bool(faults)))


def line_of(path: str, trail: Trail) -> int:
    """Return the line of a recipe file on which a value is written; 0 where it is not in that file, or there is no such file."""
    raw = _read(Path(path))
    return 0 if isinstance(raw, str) else parse_recipe(raw).lines.get(trail, 0)


@dataclass
class _Sheet:
    """The data of a file with all it extends, where each value was written, and what is wrong so far.

    ``lost`` are values that could not be read. ``partial``: something that is extended could not be read. ``broken``: nothing could.
    """

    data: dict[str, Any]
    places: dict[Trail, Place] = field(default_factory=dict)
    faults: list[tuple[Place, Fault]] = field(default_factory=list)
    lost: set[Trail] = field(default_factory=set)
    partial: bool = False
    broken: bool = False


def _built(file: str, sheet: _Sheet) -> Recipe:
    extends = sheet.places.get(("extends",), Place("", 0)).line
    recipe, found = (None, []) if sheet.broken else build_recipe(sheet.data)
    faults = [*sheet.faults, *((_place(sheet.places, fault.trail), fault) for fault in found if not _is_echo(sheet, fault))]
    if recipe is None or faults:
        problems = sorted({_problem(place, fault, extends) for place, fault in faults})
        more = len(problems) - MOST_PROBLEMS
        rest = [Problem(problems[MOST_PROBLEMS - 1].line, "\u2026", f"and {more} more problems")] if more > 0 else []
        raise ProblemsError(file, [*problems[:MOST_PROBLEMS], *rest])
    return recipe


def _is_echo(sheet: _Sheet, fault: Fault) -> bool:
    """Say whether a fault only follows from another one: a value that was lost, or a key that a broken base may have held."""
    if sheet.partial and fault.trail not in sheet.places:
        return True
    return any(fault.trail[:length] in sheet.lost for length in range(len(fault.trail) + 1))


def _place(places: Mapping[Trail, Place], trail: Trail) -> Place:
    """Return where a value was written, or the nearest thing around it."""
    around = (trail[:length] for length in range(len(trail), 0, -1))
    return next((places[part] for part in around if part in places), Place("", 0))


def _problem(place: Place, fault: Fault, extends: int) -> Problem:
    if not place.source:
        return Problem(place.line, dotted(fault.trail), fault.message)
    if not place.line:
        return Problem(0, dotted(fault.trail), f"{fault.message} ({place.source})")
    return Problem(extends, dotted(fault.trail), f"{fault.message} ({place.source}, line {place.line})")


def _load(path: Path, raw: bytes, folder: Path, chain: tuple[str, ...]) -> _Sheet:
    """Read the bytes of one file and, below it, what it extends. ``chain`` are the files that led here, real paths."""
    source = os.path.relpath(path, folder) if chain else ""
    document = parse_recipe(raw)
    sheet = _Sheet(
        document.data if isinstance(document.data, dict) else {},
        {trail: Place(source, line) for trail, line in document.lines.items()},
        [(Place(source, line), fault) for line, fault in document.faults],
        document.lost,
        broken=document.broken,
    )
    base = sheet.data.get("extends")
    if base is None:
        return sheet
    chain = (*chain, os.path.realpath(path))
    refused = _refuse_base(base, path.parent, folder, chain)
    below = b"" if refused else _read(path.parent / base)
    if refused or isinstance(below, str):
        reason = refused or f"{quoted(base)} {below if isinstance(below, str) else ''}"
        sheet.faults.append((sheet.places[("extends",)], Fault(("extends",), reason)))
        sheet.partial = True
        return sheet
    return _merged(_load(path.parent / base, below, folder, chain), sheet)


def _read(path: Path) -> bytes | str:
    """Return the bytes of a regular file, at most one more than allowed, or why it cannot be read."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return "is a folder; name the recipe in it"
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return f"does not exist{_nearest(path)}"
    except OSError as error:
        return f"cannot be read: {(error.strerror or 'unknown reason').lower()}"
    except ValueError:
        return "is no name of a file"


def _nearest(path: Path) -> str:
    try:
        known = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return ""
    hint = did_you_mean(path.name, known) if known else ""
    return hint if hint.startswith("; did") else ""


def _refuse_base(base: Any, here: Path, folder: Path, chain: tuple[str, ...]) -> str | None:
    """Say why a file may not be extended, or None. Only files that really are below the recipe's folder may."""
    if not isinstance(base, str) or not base:
        return f"expected the name of a recipe file beside this one, got {shown(base)}"
    parts = PurePosixPath(base.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in base or base.startswith("~"):
        return f"{quoted(base)} leads out of the recipe's folder; name a file in it, without '..'"
    real = os.path.realpath(here / base)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        return f"{quoted(base)} is a link out of the recipe's folder; name a file in it"
    if real in chain:
        return f"{quoted(base)} extends this recipe again: a circle; remove one 'extends'"
    if len(chain) > MOST_EXTENDS:
        return f"more than {MOST_EXTENDS} files extend one another; join some"
    return None


def _merged(base: _Sheet, sheet: _Sheet) -> _Sheet:
    """Return the sheet laid over its base: mappings merge by key, everything else replaces."""
    base.data.pop("extends", None)
    _lay_over(base.data, base.places, sheet.data, ())
    base.places.update(sheet.places)
    partial = base.partial or base.broken or sheet.partial
    return _Sheet(base.data, base.places, [*base.faults, *sheet.faults], base.lost | sheet.lost, partial, sheet.broken)


def _lay_over(below: dict[str, Any], places: dict[Trail, Place], above: Mapping[str, Any], trail: Trail) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay_over(below[key], places, value, (*trail, key))
        else:
            below[key] = value
            forget(places, (*trail, key))
