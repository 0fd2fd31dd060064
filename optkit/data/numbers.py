"""Whole numbers in digits and in English words, both ways: a small translation whose right answer is always known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from optkit.data.sides import Asked, Sides, side_of

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_LIMIT = 100_000
_COUNT = 12_000


def in_words(number: int) -> str:
    """Return the English words of a whole number from 0 to 999,999."""
    return " ".join(_words(number))


@cache
def numbers_and_words(count: int = _COUNT) -> Sides[Asked]:
    """Return so many numbers, drawn from a fixed seed, half of them below 10,000; a number stands on one side, both ways."""
    draw = random.Random(0)
    small = draw.sample(range(10_000), min(count // 2, 10_000))
    numbers = sorted({*small, *draw.sample(range(10_000, _LIMIT), count - len(small))})
    draw.shuffle(numbers)
    sides: Sides[Asked] = Sides("numbers")
    for number in numbers:
        digits, words = f"{number:,}", in_words(number)
        sides.of(side_of(digits)).extend([Asked(digits, (words,)), Asked(words, (digits,))])
    return sides.checked()


def _words(number: int) -> Iterator[str]:
    if number >= 1000:
        yield from _words(number // 1000)
        yield "thousand"
        if number % 1000:
            yield from _words(number % 1000)
    elif number >= 100:
        yield from (_SMALL[number // 100], "hundred")
        if number % 100:
            yield from ("and", *_words(number % 100))
    elif number >= 20:
        yield _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    else:
        yield _SMALL[number]
