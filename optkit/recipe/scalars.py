"""What an unquoted word of YAML means: true, false, null, decimal numbers, and everything else is text. Dates and `no` are text."""

from __future__ import annotations

import math
import re

MOST_DIGITS = 18

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")

Scalar = str | int | float | bool | None


def scalar(word: str) -> Scalar:
    """Return the value of an unquoted word, by the core rules of YAML 1.2 without octal, hexadecimal, infinity and NaN.

    Raises:
        ValueError: a number that is too long or too large; the message says so.
    """
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        digits = len(word.lstrip("+-"))
        if digits > MOST_DIGITS:
            raise ValueError(f"a whole number of {digits} digits is too long, at most {MOST_DIGITS}; if it is text, put it in quotes")
        return int(word)
    if _FLOAT.fullmatch(word):
        number = float(word)
        if math.isinf(number):
            raise ValueError("the number is too large; if it is text, put it in quotes")
        return number
    return word


def forbidden_character(text: str) -> tuple[int, str] | None:
    """Return position and name of the first control character, stray byte-order mark, odd line break or lone surrogate."""
    found = _FORBIDDEN.search(text)
    return (found.start(), f"U+{ord(found.group()):04X}") if found else None
