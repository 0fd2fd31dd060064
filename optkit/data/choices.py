"""Small questions with a few possible answers, about Python sources: for models that learn a task from examples in their prompt."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, zip_longest

from optkit.core.errors import DataError
from optkit.data.python_sources import Split, standard_library
from optkit.data.python_tokens import tagged_lines
from optkit.data.sides import Side, Sides, Tagged

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LINE = re.compile(r"^[\w .,=+'\"()\[\]{}:*-]{12,60}$")
_FILES = 150
_PARTS: tuple[tuple[Side, Split, int], ...] = (("calibration", "train", 64), ("evaluation", "eval", 100))  # items of a kind, at most


@dataclass(frozen=True)
class Choice:
    """A question, what can be said after it, and the number of the right one. An example is the question with its answer and a line end."""

    kind: str
    question: str
    options: tuple[str, ...]
    right: int

    @property
    def example(self) -> str:
        """The question with its answer."""
        return f"{self.question}{self.options[self.right]}\n"


@cache
def python_choices() -> Sides[Choice]:
    """Return questions of three kinds; examples for prompts stand on the calibration side.

    ``brackets``: which bracket closes what is open. ``classes``: whether a word is a keyword, a name, a number or an operator.
    ``firsts``: the first of three names in a list.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    sides: Sides[Choice] = Sides("python choices")
    for side, split, most in _PARTS:
        draw = random.Random(side)
        paths = standard_library(split)
        lines = [line for path in paths[:: max(1, len(paths) // _FILES)] for line in tagged_lines(path)]
        draw.shuffle(lines)
        for kind in (_brackets, _classes, _firsts):
            sides.of(side).extend(_even(dict.fromkeys(choice for line in lines for choice in kind(line, draw)), most))
    if not sides.evaluation:
        raise DataError("this Python has no sources of its standard library; name tasks of the harness instead")
    return sides


def _even(found: Iterable[Choice], most: int) -> Iterator[Choice]:
    """Yield as many with each right answer, as far as there are some, or the most frequent one would win by itself; they take turns."""
    by_answer: dict[int, list[Choice]] = {}
    for choice in found:
        by_answer.setdefault(choice.right, []).append(choice)
    turns = zip_longest(*(by_answer[right][: -(-most // len(by_answer))] for right in sorted(by_answer)))
    yield from islice((choice for choice in chain.from_iterable(turns) if choice is not None), most)


def shots_of(choice: Choice, sides: Sides[Choice], count: int, side: Side = "calibration") -> str:
    """Return so many examples of the kind of a question, the same for every model and for every question of its kind."""
    return "".join(other.example for other in [one for one in sides.of(side) if one.kind == choice.kind][:count])


def _brackets(line: Tagged, draw: random.Random) -> Iterator[Choice]:
    """Cut a line before a closing bracket that it holds."""
    text, open_ones, wanted = " ".join(line.words), [], draw.choice("([")  # braces are rare
    if not _LINE.match(text):
        return
    for place, letter in enumerate(text):
        if letter in _CLOSING:
            open_ones.append(letter)
        elif open_ones and letter == _CLOSING[open_ones[-1]]:
            options = tuple(_CLOSING.values())
            if place > 8 and open_ones[-1] == wanted:
                yield Choice("brackets", text[:place].rstrip(), options, options.index(letter))
                return
            open_ones.pop()


def _classes(line: Tagged, draw: random.Random) -> Iterator[Choice]:
    """Ask for the class of one word of a line."""
    options = ("keyword", "name", "number", "operator")
    wanted = draw.choice(options)
    word = next((word for word, tag in zip(line.words, line.tags, strict=True) if tag == wanted and len(word) <= 12), None)
    if word is not None:
        yield Choice("classes", f"{word}  # ", options, options.index(wanted))


def _firsts(line: Tagged, draw: random.Random) -> Iterator[Choice]:
    """Ask for the first of three names of a line."""
    names = list(dict.fromkeys(word for word in line.words if word.isidentifier() and 2 <= len(word) <= 10))[:3]
    if len(names) == 3:
        draw.shuffle(names)
        options = tuple(sorted(names))
        yield Choice("firsts", f"first({', '.join(names)}) == ", options, options.index(names[0]))
