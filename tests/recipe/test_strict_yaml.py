"""The text of a recipe, before anybody asks what it means."""

from __future__ import annotations

import time

import pytest

from optkit.recipe.strict_yaml import MOST_BYTES, MOST_DEPTH, MOST_VALUES, Document, parse_recipe, parse_text


def messages(document: Document) -> list[tuple[int, str]]:
    return [(line, fault.message) for line, fault in document.faults]


def only(text: str) -> tuple[int, str]:
    found = messages(parse_recipe(text.encode()))
    assert len(found) == 1, found
    return found[0]


def test_every_value_knows_its_line() -> None:
    document = parse_text("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n")
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    assert not document.faults
    lines = {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("b", 1, "d"): 5}
    assert document.lines == lines


def test_quoted_words_and_blocks_are_always_text() -> None:
    document = parse_text("a: '12'\nb: \"true\"\nc: |\n  1e5\nd: 'null'\ne: \"\"\n")
    assert document.data == {"a": "12", "b": "true", "c": "1e5\n", "d": "null", "e": ""}


def test_words_that_yaml_1_1_would_change_stay_text() -> None:
    assert parse_text("[no, 2024-01-01, 012, 1:30, 1e-5]").data == ["no", "2024-01-01", "012", "1:30", 1e-5]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: &x 2\n", 2, "anchor &x"),
        ("a: *x\n", 1, "alias *x"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "tag"),
        ("a: !!int '5'\n", 1, "tag"),
        ("a: ! x\n", 1, "tag"),
        ("a: {<<: {b: 1}}\n", 1, "merge key"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' stands twice, in lines 1 and 3"),
        ("a: 1\n5: x\n", 2, "a key must be text, got 5"),
        ("a: 1\ntrue: x\n", 2, "a key must be text, got true"),
        ("? [a]\n: 1\n", 1, "a key must be text, got a list"),
        ("? {a: 1}\n: 1\n", 1, "a key must be text, got a mapping"),
        ("?\n: 1\n", 1, "a key must be text, got nothing"),
        (f"{'k' * 201}: 1\n", 1, "a key must have 1 to 200 characters, got 201"),
        (f"a: {'1' * 5000}\n", 1, "5000 digits"),
        ("a: 1e999\n", 1, "too large"),
        ('a: "\\0"\n', 1, "U+0000"),
        ('a: "\\ud800"\n', 1, "U+D800"),
        ('a: "\\U00110000"\n', 1, "no valid YAML"),
        ('a: "\\UFFFFFFFF"\n', 1, "no valid YAML"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "no valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "no valid YAML"),
        ("%TAG ! tag:x,2000:\n---\na: 1\n", 1, "%TAG"),
        (f"%YAML {'9' * 5000}.1\n---\na: 1\n", 1, "no valid YAML"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        ("a: \x00\n", 1, "U+0000"),
        ("a: \x1b[31m\n", 1, "U+001B"),
        ("", 0, "the file is empty"),
        ("# nothing\n", 0, "the file is empty"),
        ("---\n", 0, "the file is empty"),
        ("- a\n- b\n", 1, "got a list"),
        ("just text\n", 1, "got 'just text'"),
        ("\n\n5\n", 3, "got 5"),
    ],
)
def test_what_no_recipe_needs_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    found_line, message = only(text)
    assert words in message
    assert found_line == line


def test_a_value_without_its_key_does_not_hide_the_rest() -> None:
    document = parse_recipe(b"a: *x\n5: &y [1]\nb: !t 2\nb: 3\nc: 1\n")
    assert [line for line, _ in messages(document)] == [1, 2, 2, 3, 4]
    assert document.data["c"] == 1
    assert document.lost == {("a",), ("b",)}
    assert not document.broken


def test_nesting_is_allowed_up_to_its_limit() -> None:
    assert not parse_text("[" * MOST_DEPTH + "]" * MOST_DEPTH).faults
    assert "nested deeper" in messages(parse_text("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)))[0][1]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "? " * 100_000, "a: " + "[" * 500 + "]" * 500])
def test_endless_nesting_is_one_problem_and_quick(text: str) -> None:
    started = time.monotonic()
    document = parse_recipe(text.encode())
    assert len(document.faults) == 1
    assert document.broken
    assert time.monotonic() - started < 5


def test_a_bomb_of_aliases_is_refused_without_growing() -> None:
    rows = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]" for before, after in zip("abcdefgh", "bcdefghi", strict=True)]
    document = parse_recipe("\n".join(rows).encode())
    assert all("not allowed" in message for _, message in messages(document))
    assert document.data["i"] == [None] * 10


def test_a_list_that_contains_itself_is_refused() -> None:
    assert [line for line, _ in messages(parse_recipe(b"a: &a [*a]\n"))] == [1, 1]


def test_too_many_values_stop_the_reading() -> None:
    document = parse_recipe(b"a: [" + b"1," * (MOST_VALUES + 5) + b"]")
    assert [message.split(";")[0] for _, message in messages(document)] == ["more than 10,000 values"]
    assert document.broken


def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_is_read() -> None:
    assert "larger than 1,000,000 bytes" in only("a: " + "x" * MOST_BYTES)[1]
    assert not parse_recipe(b"a: " + b"x" * (MOST_BYTES - 3)).faults


def test_too_many_lines_are_refused_before_they_are_read() -> None:
    assert "more than 10,000 lines" in only("a: |\n" + " x\n" * 10_000)[1]


def test_a_byte_order_mark_in_front_is_no_part_of_the_first_key() -> None:
    assert parse_recipe(b"\xef\xbb\xbfname: x\n").data == {"name": "x"}


@pytest.mark.parametrize("raw", [b"a: 1\nb: \xff\n", "a: 1\nb: ä\n".encode("latin-1")])
def test_other_encodings_are_refused_with_the_line(raw: bytes) -> None:
    ((line, message),) = messages(parse_recipe(raw))
    assert line == 2
    assert "save the file as UTF-8" in message


def test_utf_16_is_refused() -> None:
    assert "save the file as UTF-8" in messages(parse_recipe("a: 1".encode("utf-16")))[0][1]


def test_windows_line_ends_count_once() -> None:
    assert parse_recipe(b"a: 1\r\nb: 2\r\n").lines[("b",)] == 2
