"""Questions on the signatures of the standard library's functions; the answer is always a piece of the signature."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from optkit.data.functions import by_file, library_functions
from optkit.data.sides import Asked, Sides

_FILES = 250
_LEAST, _MOST = 2, 8  # parameters


@cache
def questions_on_signatures() -> Sides[Asked]:
    """Return questions, each followed by its signature, with the answer; each file and each signature stands on one side."""
    items: dict[str, list[Asked]] = {}
    seen: set[str] = set()
    for file, _, function in library_functions(_FILES):
        signature = f"def {function.name}({ast.unparse(function.args)})"
        if signature not in seen:
            seen.add(signature)
            found = [Asked(f"{question} {signature}", (answer,)) for question, answer in _questions(function)]
            items.setdefault(file, []).extend(found)
    return by_file("signatures", {file: found for file, found in items.items() if found})


def _questions(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    listed = function.args.posonlyargs + function.args.args
    names = [argument.arg for argument in listed]
    defaults = dict(zip(names[len(names) - len(function.args.defaults) :], function.args.defaults, strict=True))
    if not _LEAST <= len(names) <= _MOST:
        return
    yield "Which parameter is the last?", names[-1]
    yield "What is the name of the function?", function.name
    for name, after in pairwise(names):
        if name != "self":
            yield f"Which parameter follows {name}?", after
    for name, default in defaults.items():
        yield f"What is the default of {name}?", ast.unparse(default)
