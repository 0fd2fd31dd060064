"""Documentation strings of the standard library with the package that each stands in: texts with a label that nobody had to write."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from optkit.core.errors import DataError
from optkit.data.python_sources import is_test, read_source
from optkit.data.sides import Labelled, Sides, shares_of

PACKAGES = 8  # those with the most documentation strings
_SHORTEST = 24  # characters
_NEVER = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "lib2to3"}


@cache
def by_package() -> Sides[Labelled]:
    """Return the paragraphs of documentation strings with the name of their package; each file stands on one side.

    A text that stands in several places counts where it is met first; the name of the package is taken out of it.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.glob("*/**/*.py")) if not _NEVER & set(path.relative_to(root).parts)]
    files = [path for path in files if not is_test(path.relative_to(root))]
    found = [(path.relative_to(root), text) for path in files for text in _paragraphs(read_source(path))]
    counts = Counter(relative.parts[0] for relative, _ in found)
    chosen = {name for name, _ in counts.most_common(PACKAGES)}
    if len(chosen) < 2:
        raise DataError("this Python has no sources of its standard library; name a file of your own")
    items: dict[str, dict[str, list[Labelled]]] = {package: {} for package in sorted(chosen)}
    seen: set[str] = set()
    for relative, text in found:
        package = relative.parts[0]
        bare = " ".join(word for word in text.split() if package not in word.lower())
        if package in chosen and bare not in seen and len(bare) >= _SHORTEST:
            seen.add(bare)
            items[package].setdefault(relative.as_posix(), []).append(Labelled(bare, package))
    sides: Sides[Labelled] = Sides("docstrings")
    for files_of_one in items.values():
        for name, side in shares_of({name: len(found) for name, found in files_of_one.items()}).items():
            sides.of(side).extend(files_of_one[name])
    return sides.checked()


def _paragraphs(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (text.strip() for text in (ast.get_docstring(node) or "").split("\n\n") if text.strip())
