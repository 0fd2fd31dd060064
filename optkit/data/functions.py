"""Functions of the standard library: the words of their code, and what they say of it in the first line of their documentation string."""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from optkit.core.errors import DataError
from optkit.data.python_sources import Split, installed_packages, is_test, read_source, standard_library
from optkit.data.sides import Asked, Sides, shares_of

_SHORTEST, _LONGEST = 12, 120  # characters of a summary
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_functions(most: int | None = None) -> Iterator[tuple[str, list[str], _Function]]:
    """Yield the functions of the standard library outside of its tests, with the name of their file and its lines.

    Args:
        most: files, evenly spread over all; None for all.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: tuple[Split, ...] = ("train", "eval")
    paths = sorted(path for split in splits for path in standard_library(split) if not is_test(path.relative_to(root)))
    if not paths:
        raise DataError("this Python has no sources of its standard library; name a file of your own")
    for path in _spread(paths, most):
        for lines, node in _functions(path):
            yield path.relative_to(root).as_posix(), lines, node


@cache
def bodies_with_summaries(packages: int = 0) -> Sides[Asked]:
    """Return the words of functions without their documentation string, and its first line; each file stands on one side.

    Names are parted into their words, as in LeClair et al. 2019 (arXiv 1902.01954), and signs are left out. Equal texts and equal
    summaries count where they are met first.

    Args:
        packages: files of installed packages, evenly spread over all, whose functions are learnt from as well; the other sides have none.
            Those that say nothing of themselves are summed up by their names, as in Allamanis et al. 2016 (arXiv 1602.03001).

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    items: dict[str, list[Asked]] = {}
    codes, summaries = set[str](), set[str]()

    def is_new(item: Asked) -> bool:
        if item.text in codes or item.answers[0] in summaries:
            return False
        codes.add(item.text)
        summaries.add(item.answers[0])
        return True

    for name, lines, function in library_functions():
        item = _summarized(lines, function)
        if item is not None and is_new(item):
            items.setdefault(name, []).append(item)
    sides = by_file("functions", items)

    def of_packages() -> Iterator[Asked]:
        for path in _spread(installed_packages(tests=False), packages):
            found = (_summarized(lines, function) or _named(lines, function) for lines, function in _functions(path))
            yield from (item for item in found if item is not None and is_new(item))

    if packages:
        sides.further.append(of_packages)
    return sides


def by_file(name: str, items: dict[str, list[Asked]]) -> Sides[Asked]:
    """Part items by the files that they stand in.

    Raises:
        DataError: a side has nothing.
    """
    sides: Sides[Asked] = Sides(name)
    for file, side in shares_of({file: len(found) for file, found in items.items()}).items():
        sides.of(side).extend(items[file])
    return sides.checked()


def _summarized(lines: list[str], function: _Function) -> Asked | None:
    """Return a function's words with the first line of its documentation string; None where it has none, or little else."""
    summary = (ast.get_docstring(function) or "").partition("\n\n")[0].replace("\n", " ").strip()
    rest = function.body[1:]
    if not rest or not _SHORTEST <= len(summary) <= _LONGEST:
        return None
    return Asked(_words(lines, function, rest), (summary,))


def _named(lines: list[str], function: _Function) -> Asked | None:
    """Return a function's words with those of its name; None where it says something of itself, or its name is one word."""
    name = words_of(function.name)
    if ast.get_docstring(function) or function.name.startswith("__") or " " not in name:
        return None
    return Asked(_words(lines, function, function.body), (f"{name.capitalize()}.",))


def _words(lines: list[str], function: _Function, body: list[ast.stmt]) -> str:
    code = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : function.end_lineno]))
    return words_of(f"def {function.name} {ast.unparse(function.args)} {code}")


def words_of(code: str) -> str:
    """Return the words that names, texts and numbers of a code are made of: "read lines n" of "readLines(n)"."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"[^A-Za-z0-9]+", " ", code))
    return parted.strip().lower()


def _functions(path: Path) -> Iterator[tuple[list[str], _Function]]:
    """Yield the functions of a file, with its lines."""
    source = read_source(path)
    lines = source.splitlines()
    for node in ast.walk(_tree(source)):
        if isinstance(node, _Function):
            yield lines, node


def _spread(paths: list[Path], most: int | None) -> list[Path]:
    return paths[:: max(1, len(paths) // most) if most else 1]


def _tree(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
