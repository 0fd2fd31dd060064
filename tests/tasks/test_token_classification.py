"""Tags of words, judged by whole entities, in the format of CoNLL-2003."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from optkit.core.errors import DataError
from optkit.core.measurement import Metric
from optkit.data.python_tokens import by_lexical_class
from optkit.data.sides import SIDES
from optkit.tasks.token_classification import ColumnFiles, TokenClassification, entities

SENTENCE = "{0} NNP B-NP B-PER\n{0} NNP I-NP I-PER\nx VB B-VP O\n{1} NNP B-NP B-LOC\n. . O O\n\n"


def write(path: Path, count: int = 200) -> TokenClassification:
    lines = [SENTENCE.format(f"P{number}", f"L{number % 7}") for number in range(count)]
    path.write_text("-DOCSTART- -X- -X- O\n\n" + "".join(lines))
    return TokenClassification(corpus=ColumnFiles(files=(str(path),)), length=16)


def test_entities_are_read_as_conll_means_them() -> None:
    tags = ["O", "B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-LOC", "B-PER", "I-LOC", "name", "name"]
    assert list(entities(tags)) == [
        ("PER", 1, 3),
        ("LOC", 4, 5),
        ("LOC", 5, 7),
        ("PER", 7, 8),
        ("LOC", 8, 9),
        ("name", 9, 10),
        ("name", 10, 11),
    ]


def score(task: TokenClassification, columns: Any, name: str) -> float:
    metric: Metric = next(one for one in task.metrics() if one.name == name)
    return float(metric.estimate({key: np.asarray(column, float)[None] for key, column in columns.items()})[0])


def test_an_entity_counts_only_as_a_whole(tmp_path: Path, tokenizer: Any) -> None:
    task = write(tmp_path / "own.txt")
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O") and task.entity_kinds == ("LOC", "PER")
    answers = task.examples("evaluation", tokenizer).answers
    perfect = task.judge(functional.one_hot(answers.clamp_min(0), 4), answers)
    assert [score(task, perfect, name) for name in ("f1", "precision", "recall", "f1_loc", "accuracy")] == [1, 1, 1, 1, 1]
    halved = torch.where(answers == 2, 3, answers)  # the second word of every person is lost
    found = task.judge(functional.one_hot(halved.clamp_min(0), 4), answers)
    assert score(task, found, "f1_per") == 0
    assert score(task, found, "f1_loc") == 1
    assert score(task, found, "f1") == pytest.approx(0.5)
    assert score(task, found, "accuracy") == pytest.approx(0.8)


def test_the_trivial_answer_knows_the_words_of_training_alone(tmp_path: Path, tokenizer: Any) -> None:
    task = write(tmp_path / "own.txt")
    _, columns = task.trivial(tokenizer)
    assert score(task, columns, "f1_loc") == 1  # seven places, all known
    assert score(task, columns, "f1_per") < 0.2  # nobody is


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a B-PER\nb\n", "own.txt row 2 has a word, 'b', and no tag"),
        (b"a O\n\nb O\n", "has fewer than two tags"),
        (b"a B-\xff\n", "own.txt is not UTF-8 text: byte 4 is 0xff"),
    ],
)
def test_broken_files_are_told_by_row(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(DataError, match=told):
        TokenClassification(corpus=ColumnFiles(files=(str(tmp_path / "own.txt"),))).look()


def test_lines_of_python_have_the_classes_that_the_interpreter_gives() -> None:
    sides = by_lexical_class()
    everyone = [item for side in SIDES for item in sides.of(side)]
    assert len(everyone) > 2000
    pairs = {pair for item in everyone for pair in zip(item.words, item.tags, strict=True)}
    assert {("def", "keyword"), ("(", "operator"), ("0", "number"), ("self", "name"), ("len", "call")} <= pairs
    assert {tag for _, tag in pairs} == {"keyword", "number", "string", "operator", "function", "class", "attribute", "call", "name"}
