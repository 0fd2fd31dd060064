"""Unquoted words of YAML."""

from __future__ import annotations

import pytest

from optkit.recipe.scalars import forbidden_character, scalar


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[("1e-5", 1e-5), ("1.5", 1.5), (".5", 0.5), ("-2.", -2.0), ("+3E+2", 300.0), ("0.0", 0.0), ("1e99", 1e99)],
        *[("0", 0), ("-12", -12), ("+7", 7), ("9" * 18, int("9" * 18))],
        *[("true", True), ("false", False), ("null", None), ("~", None), ("", None)],
    ],
)
def test_a_word_of_the_core_rules_has_its_value(word: str, value: object) -> None:
    found = scalar(word)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word",
    [
        "no",
        "on",
        "yes",
        "True",
        "NULL",
        "2024-01-01",
        "012",
        "1:30",
        "0x10",
        "0o7",
        "0b1",
        "1_000",
        ".inf",
        "nan",
        ".",
        "-",
        "1e",
        "01.5",
        "١",
    ],
)
def test_everything_else_is_text(word: str) -> None:
    assert scalar(word) == word


@pytest.mark.parametrize(
    ("word", "reason"), [("1" * 19, "19 digits"), ("7" * 5000, "5000 digits"), ("1e999", "too large"), ("-1e400", "too large")]
)
def test_numbers_beyond_reason_are_refused(word: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scalar(word)


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\ud800", "\ufeff", "\uffff"])
def test_a_control_character_is_found_and_named(character: str) -> None:
    assert forbidden_character(f"ab{character}") == (2, f"U+{ord(character):04X}")


def test_ordinary_text_of_any_script_is_allowed() -> None:
    assert forbidden_character("tab\t line\r\n é 漢字 🙂") is None
