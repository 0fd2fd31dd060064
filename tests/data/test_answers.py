"""Texts with answers that come with Python itself: right, on one side each, and the same on every call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.core.errors import DataError
from optkit.data.choices import python_choices, shots_of
from optkit.data.functions import bodies_with_summaries
from optkit.data.numbers import in_words, numbers_and_words
from optkit.data.sides import SIDES, Sides, stretched
from optkit.data.signatures import questions_on_signatures
from optkit.data.squad import squad_questions

VALUES = {word: value for value, word in enumerate(in_words(n) for n in range(20))} | {in_words(n): n for n in range(20, 100, 10)}


def value_of(words: str) -> int:
    """Read a number in words, by another way than it was written."""
    total = part = 0
    for word in words.replace("-", " ").replace(" and ", " ").split():
        if word == "thousand":
            total, part = total + part * 1000, 0
        else:
            part = part * 100 if word == "hundred" else part + VALUES[word]
    return total + part


@given(st.integers(0, 999_999))
def test_numbers_in_words_read_as_what_they_were(number: int) -> None:
    assert value_of(in_words(number)) == number


def test_a_number_stands_on_one_side_both_ways() -> None:
    sides = numbers_and_words(2000)
    seen = [{frozenset((item.text, *item.answers)) for item in sides.of(side)} for side in SIDES]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 2000
    assert sum(len(sides.of(side)) for side in SIDES) == 4000
    assert sides.sha256("evaluation") == numbers_and_words(2000).sha256("evaluation")


@pytest.mark.parametrize("read", [bodies_with_summaries, questions_on_signatures])
def test_no_text_stands_on_two_sides(read: Callable[[], Sides[Any]]) -> None:
    sides = read()
    texts = [{item.whole for item in sides.of(side)} for side in SIDES]
    assert sum(map(len, texts)) == len(set.union(*texts)) > 1000
    assert len(sides.training) > 2 * len(sides.evaluation) > 100


def test_answers_to_questions_on_signatures_stand_in_them() -> None:
    items = questions_on_signatures().evaluation
    assert len(items) > 1000
    assert all(item.context[item.start : item.start + len(item.answers[0])] == item.answers[0] for item in items)


def test_choices_are_even_and_examples_are_of_the_same_kind_and_never_asked() -> None:
    sides = python_choices()
    asked = {item.question for item in sides.evaluation}
    for kind in ("brackets", "classes", "firsts"):
        mine = [item for item in sides.evaluation if item.kind == kind]
        most = max(sum(item.right == number for item in mine) for number in range(4))
        assert 60 <= len(mine) <= 100 and most <= 50
    shown = shots_of(sides.evaluation[0], sides, 4)
    assert shown.count("\n") == 4 and not any(line[:-1] in asked for line in shown.splitlines())


def test_few_long_texts_are_cut_into_a_stretch_a_side_in_order() -> None:
    text = "".join(f"line {number}\n" for number in range(160))
    sides = stretched("own", [text])
    assert "".join(sides.of(side)[0] for side in ("training", "validation", "calibration", "evaluation")) == text
    assert all(sides.of(side)[0].endswith("\n") for side in SIDES)
    assert abs(len(sides.training[0]) / len(text) - 10 / 16) < 0.02


def squad(change: Callable[[Any], None] = lambda whole: None) -> Any:
    asked = [{"id": "a", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada", "answer_start": 9}]}]
    asked += [{"id": "b", "question": "Where?", "is_impossible": True, "answers": []}]
    whole = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "Ada and Ada.", "qas": asked}]}]}
    change(whole)
    return whole


def test_questions_of_squad_files_keep_each_answer_once_and_those_without_one(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad()))
    found = squad_questions(path)
    assert [(item.question, item.context, item.answers, item.start) for item in found] == [
        ("Who?", "Ada and Ada.", ("Ada",), 0),
        ("Where?", "Ada and Ada.", (), -1),
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"data": ', "is no JSON"),
        (b'\xff{"data": []}', "is not UTF-8 text: byte 0 is 0xff"),
        (b"[]", "has no list 'data', as SQuAD files have"),
        (
            json.dumps(squad(lambda w: w["data"][0]["paragraphs"][0].pop("context"))).encode(),
            r"data\[0\].paragraphs\[0\] has no text 'context'",
        ),
        (json.dumps(squad(lambda w: w["data"][0]["paragraphs"][0]["qas"][1].pop("answers"))).encode(), r"qas\[1\] has no list 'answers'"),
        (
            json.dumps(squad(lambda w: w["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=3))).encode(),
            r"qas\[0\]: its answer 'Ada' does not stand at 3 of its context",
        ),
    ],
    ids=["broken", "bytes", "list", "no context", "no answers", "another place"],
)
def test_faults_of_squad_files_are_told_with_their_place(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "dev.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        squad_questions(path)


def test_functions_of_packages_are_learnt_from_and_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bodies_with_summaries()
    known = plain.evaluation[0]
    source = f'def new(x):\n    """Return what is new here."""\n    return x\n\n\ndef old():\n    """{known.answers[0]}"""\n    return 1\n'
    source += "\n\ndef readAll_lines(maxSize=3):\n    return maxSize\n\n\ndef plain(x):\n    return x\n"
    (tmp_path / "package.py").write_text(source)
    monkeypatch.setattr("optkit.data.functions.installed_packages", lambda tests: [tmp_path / "package.py"])
    more = bodies_with_summaries(1)
    assert more.evaluation == plain.evaluation and more.calibration == plain.calibration
    added = more.of("training")[len(plain.training) :]
    assert [(item.text, item.answers[0]) for item in added] == [
        ("def new x return x", "Return what is new here."),
        ("def read all lines max size 3 return max size", "Read all lines."),
    ]
