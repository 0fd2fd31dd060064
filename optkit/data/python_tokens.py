"""Lines of Python source as words with their lexical class: a tagging task whose right answers the interpreter knows."""

from __future__ import annotations

import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from optkit.core.errors import DataError
from optkit.data.python_sources import is_test, read_source, standard_library
from optkit.data.sides import Sides, Tagged, parted

_FILES, _LINES = 400, 24  # at most, and of each file
_SHORTEST, _LONGEST = 4, 40  # words of a line


@cache
def by_lexical_class() -> Sides[Tagged]:
    """Return logical lines of the standard library, split by file.

    The classes: keyword, number, string, operator, and for names: function and class where they are defined, attribute after a dot,
    call before a bracket, name for all others. Comments are left out.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for side in ("train", "eval") for path in standard_library(side) if not is_test(path.relative_to(root)))
    step = max(1, len(files) // _FILES)
    keyed = [(path.relative_to(root).as_posix(), line) for path in files[::step] for line in tagged_lines(path)]
    if not keyed:
        raise DataError("this Python has no sources of its standard library; name a file of your own")
    return parted("python tokens", keyed)


def tagged_lines(path: Path) -> list[Tagged]:
    """Return some logical lines of a source file, evenly spread, as words with their lexical class."""
    lines = [line for line in _lines(read_source(path)) if _SHORTEST <= len(line.words) <= _LONGEST]
    return lines[:: max(1, len(lines) // _LINES)]


def _lines(source: str) -> Iterator[Tagged]:
    words: list[tuple[str, str]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                if words:
                    yield _tagged(words)
                words = []
            elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
                words.append((token.string, tokenize.tok_name[token.type].lower()))
    except (tokenize.TokenError, SyntaxError):
        return


def _tagged(words: list[tuple[str, str]]) -> Tagged:
    tags = []
    for position, (word, kind) in enumerate(words):
        before = words[position - 1][0] if position else ""
        after = words[position + 1][0] if position + 1 < len(words) else ""
        tags.append({"number": "number", "string": "string", "op": "operator"}.get(kind) or _kind_of_name(word, before, after))
    return Tagged(tuple(word for word, _ in words), tuple(tags))


def _kind_of_name(word: str, before: str, after: str) -> str:
    if keyword.iskeyword(word):
        return "keyword"
    if before in ("def", "class"):
        return {"def": "function", "class": "class"}[before]
    if after == "(":
        return "call"
    return "attribute" if before == "." else "name"
