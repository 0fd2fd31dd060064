"""Files of one word a line with its tag, sentences parted by empty lines: the format of CoNLL-2003."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optkit.core.errors import DataError
from optkit.data.reading import lines_of
from optkit.data.sides import Tagged

_DOCUMENT = "-DOCSTART-"


def read_columns(path: Path, word: int, tag: int) -> Iterator[Tagged]:
    """Yield the sentences; ``word`` and ``tag`` are positions of columns, negative ones from the end.

    Raises:
        DataError: a line has too few columns, or the file is not UTF-8 text.
    """
    lines = lines_of(path)
    words: list[tuple[str, str]] = []
    for number, line in enumerate([*lines, ""], 1):
        parts = line.split()
        if not parts or parts[0] == _DOCUMENT:
            if words:
                yield Tagged(tuple(one for one, _ in words), tuple(one for _, one in words))
            words = []
            continue
        try:
            words.append((parts[word], parts[tag]))
        except IndexError:
            raise DataError(f"{path} row {number} has {len(parts)} columns, and the word is in {word} and its tag in {tag}") from None
        if len(parts) == 1:
            raise DataError(f"{path} row {number} has a word, {parts[0][:40]!r}, and no tag")
