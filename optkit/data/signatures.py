"""Questions on the signatures of the standard library's functions; the answer is always a piece of the signature."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from optkit.data.functions import by_file, library_functions
from optkit.data.sides import Asked, Sides

_FILES = 250
_LEAST, _MOST = 2, 8  # parameters


@cache
def questions_on_signatures() -> Sides[Asked]:
    """Return questions on a signature with the answer and its place; each file and each signature stands on one side."""
    items: dict[str, list[Asked]] = {}
    seen: set[str] = set()
    for file, _, function in library_functions(_FILES):
        signature = f"def {function.name}({ast.unparse(function.args)})"
        if signature not in seen:
            seen.add(signature)
            items.setdefault(file, []).extend(_questions(function, signature))
    return by_file("signatures", {file: found for file, found in items.items() if found})


def _questions(function: ast.FunctionDef | ast.AsyncFunctionDef, signature: str) -> Iterator[Asked]:
    listed = function.args.posonlyargs + function.args.args
    names = [argument.arg for argument in listed]
    defaults = dict(zip(names[len(names) - len(function.args.defaults) :], function.args.defaults, strict=True))
    if not _LEAST <= len(names) <= _MOST:
        return

    def asked(question: str, answer: str, after: int) -> Asked:
        return Asked(question, (answer,), signature, signature.index(answer, after))

    places, after = {}, signature.index("(")
    for name in names:
        found = re.compile(rf"\b{re.escape(name)}\b(?=[=,:)])").search(signature, after)
        if found is None:
            return
        places[name], after = found.start(), found.end()
    yield asked("Which parameter is the last?", names[-1], places[names[-1]])
    yield asked("What is the name of the function?", function.name, len("def "))
    for name, following in pairwise(names):
        if name != "self":
            yield asked(f"Which parameter follows {name}?", following, places[following])
    for name, default in defaults.items():
        answer = ast.unparse(default)
        if answer in signature[places[name] :]:
            yield asked(f"What is the default of {name}?", answer, places[name] + len(name))
