"""Python source files as a corpus: the standard library, of which every eighth file is held out, and installed packages.

The split is by a hash of the file's name, so it is the same on every machine and for every interpreter version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from optkit.core.errors import DataError
from optkit.data.sides import Sides, side_of

Split = Literal["train", "eval"]

_HOLD_OUT = 8
_TABLES = {"encodings", "pydoc_data"}  # generated tables: they would flatter the score
_SHINGLE_LINES = 4
_MIN_LINE = 12


def standard_library(split: Split) -> list[Path]:
    """Return the standard library's source files of one split, sorted by name.

    ``eval`` is every eighth file by hash, without tests and generated tables. ``train`` is the rest, tests included.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not _foreign(path.relative_to(root))]
    if split == "train":
        return [path for path in files if not is_held_out(path.relative_to(root))]
    return [
        path
        for path in files
        if is_held_out(path.relative_to(root)) and not is_test(path.relative_to(root)) and not _TABLES & set(path.relative_to(root).parts)
    ]


@cache
def sources_by_side() -> Sides[str]:
    """Return the texts of the standard library's source files: the held-out ones for evaluation, the rest, without tests, parted by name.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sides: Sides[str] = Sides("python", evaluation=[text for path in standard_library("eval") if (text := read_source(path))])
    known = set(sides.evaluation)
    for path in standard_library("train"):
        relative = path.relative_to(root)
        if not is_test(relative) and not _TABLES & set(relative.parts) and (text := read_source(path)) and text not in known:
            known.add(text)
            side = side_of(relative.as_posix())
            sides.of("training" if side == "evaluation" else side).append(text)
    if not sides.evaluation or not sides.training:
        raise DataError("this Python has no sources of its standard library; name text files: corpus: {files: [...]}")
    return sides.checked()


def installed_packages(tests: bool = True) -> list[Path]:
    """Return the source files of all installed packages, sorted by name; with or without their tests."""
    roots = {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}
    found = ((path, path.relative_to(root)) for root in roots for path in root.rglob("*.py"))
    return sorted(path for path, name in found if name.parts[0] != "optkit" and (tests or not is_test(name)))


def is_held_out(relative: Path) -> bool:
    """Say whether a file, named relative to the library's root, belongs to the held-out eighth."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HOLD_OUT == 0


def is_test(relative: Path) -> bool:
    """Say whether a file is part of a test suite, by its path."""
    return any(part in {"test", "tests", "idle_test"} or part.startswith("test_") for part in relative.parts)


def read_source(path: Path) -> str:
    """Return a file's text, or an empty string where it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def without_copies(files: Iterable[Path], held_out: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield (path, text) of the files that share less than a tenth of their code with any held-out file.

    Packages vendor parts of the standard library; training on such a copy would leak the evaluation text. Code is compared
    by runs of four consecutive non-trivial lines.
    """
    known: set[int] = set()
    for path in held_out:
        known.update(_shingles(read_source(path)))
    for path in files:
        text = read_source(path)
        shingles = _shingles(text)
        if text and sum(one in known for one in shingles) <= len(shingles) / 10:
            yield path, text


def _shingles(text: str) -> list[int]:
    lines = [line for raw in text.splitlines() if len(line := raw.strip()) >= _MIN_LINE]
    return [hash(tuple(lines[i : i + _SHINGLE_LINES])) for i in range(len(lines) - _SHINGLE_LINES + 1)]


def _foreign(relative: Path) -> bool:
    return "site-packages" in relative.parts or "dist-packages" in relative.parts or "lib2to3/tests/data" in relative.as_posix()
