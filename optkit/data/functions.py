"""Functions of the standard library: what they do, and what they say of it in the first line of their documentation string."""

from __future__ import annotations

import ast
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
    """Return the code of functions without their documentation string, and its first line; each file stands on one side.

    Equal codes and equal summaries count where they are met first.

    Args:
        packages: files of installed packages, evenly spread over all, whose functions are learnt from as well; the other sides have none.

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
            found = (_summarized(lines, function) for lines, function in _functions(path))
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
    """Return a function's code with the first line of its documentation string; None where it has none, or little else."""
    summary = (ast.get_docstring(function) or "").partition("\n\n")[0].replace("\n", " ").strip()
    rest = function.body[1:]
    if not rest or not _SHORTEST <= len(summary) <= _LONGEST:
        return None
    body = textwrap.dedent("\n".join(lines[rest[0].lineno - 1 : function.end_lineno]))
    return Asked(f"def {function.name}({ast.unparse(function.args)}):\n{body}", (summary,))


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
