"""Texts and their classes: scores as scikit-learn gives them, data in the formats that people have, and faults by file and row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines import engine_for
from optkit.models.networks.bilstm import BilstmClassifier
from optkit.tasks.classes import counts, f1, precision, recall
from optkit.tasks.text_classification import LabelledFiles, TextClassification

WORDS = {"fruit": ["x", "y"], "tool": ["(", ")"], "sign": ["+", "-"]}


def rows(count: int = 60) -> list[dict[str, str]]:
    return [{"text": f"{WORDS[label][number % 2]} = {number}", "label": label} for number in range(count) for label in WORDS]


def from_csv(folder: Path, found: list[dict[str, Any]]) -> TextClassification:
    with (folder / "own.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(found)
    return TextClassification(corpus=LabelledFiles(files=(str(folder / "own.csv"),)), length=8)


@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_scores_by_class_are_those_of_scikit_learn(classes: int, items: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    right, given_ = (draw.integers(0, classes, (2, items)).astype(float) for _ in range(2))
    found = counts(right, given_, classes)
    for own, theirs in ((precision, "precision_score"), (recall, "recall_score"), (f1, "f1_score")):
        for number in range(2):
            expected = getattr(sklearn, theirs)(right[number], given_[number], labels=range(classes), average=None, zero_division=0.0)
            np.testing.assert_allclose(own(found)[number], expected)


def test_a_perfect_and_a_trivial_answer_are_told_apart(tmp_path: Path, tokenizer: Any) -> None:
    task = from_csv(tmp_path, rows())
    assert task.labels == ("fruit", "sign", "tool")
    _, trivial = task.trivial(tokenizer)
    perfect = {"answer": trivial["right"], "right": trivial["right"]}
    metrics = {metric.name: metric for metric in task.metrics()}

    def score(name: str, columns: Any) -> float:
        return float(metrics[name].estimate({key: column[None] for key, column in columns.items()})[0])

    assert [score(name, perfect) for name in ("accuracy", "f1", "f1_tool")] == [1, 1, 1]
    assert score("accuracy", trivial) < 0.6
    assert score("f1", trivial) < 0.3


def test_evaluated_in_two_ranks_and_against_itself_the_answers_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    task = from_csv(tmp_path, rows())
    subject = Subject(BilstmClassifier(96, 8, 8, 3).eval(), "bilstm", kind="module", tokenizer=tokenizer)
    kept = tmp_path / "kept"
    kept.mkdir()
    whole = task.evaluate(subject, engine_for(subject), Group(), None, kept)
    again = task.evaluate(subject, engine_for(subject), Group(), kept, None)
    assert again["same"].tolist() == [1.0] * len(whole["answer"])
    assert np.array_equal(again["answer"], whole["answer"]) and len(whole["answer"]) == len(task.sides.evaluation)
    card = task.card(subject)
    assert (card.task, card.items) == ("text-classification", len(whole["answer"]))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_formats_hold_the_same_items(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    other = TextClassification(corpus=LabelledFiles(files=(str(path),)))
    assert other.sides.evaluation == from_csv(tmp_path, rows()).sides.evaluation


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: [{**row, "label": "fruit"} for row in found], "knows 1 class; a classifier needs two at least"),
        (lambda found: [*found[:3], {"text": "  ", "label": "tool"}, *found[3:]], "own.csv row 5 has an empty text in 'text'"),
        (lambda found: found[:2], "too little for four sides"),
    ],
    ids=["one class", "empty text", "two rows"],
)
def test_data_that_cannot_be_learned_from_is_refused(tmp_path: Path, change: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        from_csv(tmp_path, change(rows())).look()


def test_calibration_shows_no_evaluated_text_and_no_answer(tmp_path: Path, tokenizer: Any) -> None:
    task = from_csv(tmp_path, rows())
    subject = Subject(BilstmClassifier(96, 8, 8, 3), "bilstm", kind="module", tokenizer=tokenizer)
    batches = task.calibration(subject, 5).batches
    assert sum(len(batch["input_ids"]) for batch in batches) == 5
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)
    shown = torch.cat([batch["input_ids"] for batch in batches])
    calibrated = {tuple(ids.tolist()) for ids in task.examples("calibration", tokenizer).inputs["input_ids"]}
    assert shown.shape == (5, 8) and {tuple(ids.tolist()) for ids in shown} <= calibrated
    assert not {item.text for item in task.sides.calibration} & {item.text for item in task.sides.evaluation}


def test_a_longer_text_is_answered_by_the_mean_over_its_windows(tmp_path: Path, tokenizer: Any) -> None:
    found = rows()
    found[0]["text"] = " ".join(f"x = {number}" for number in range(20))
    task = from_csv(tmp_path, found).model_copy(update={"stride": 5})
    longest = max(range(len(task.sides.evaluation)), key=lambda item: len(task.sides.evaluation[item].text))
    if len(task.sides.evaluation[longest].text) < 50:  # the long one stands on another side
        task.sides.evaluation[longest] = type(task.sides.evaluation[0])(found[0]["text"], found[0]["label"])
    inputs = task.examples("evaluation", tokenizer).inputs
    ids = tokenizer(task.sides.evaluation[longest].text)["input_ids"]
    beginnings = range(0, max(1, len(ids) - 3), 5)  # until a window holds the last token
    windows = [ids[begin : begin + 8] for begin in beginnings if begin == 0 or begin + 3 < len(ids)]
    mask = inputs["attention_mask"][longest].bool()
    assert [row[there].tolist() for row, there in zip(inputs["input_ids"][longest], mask, strict=True) if there.any()] == windows
    torch.manual_seed(0)
    module = BilstmClassifier(96, 8, 8, 3).eval()
    subject = Subject(module, "own", kind="module", tokenizer=tokenizer)
    columns = task.evaluate(subject, engine_for(subject), Group(), None, None)
    with torch.inference_mode():
        logits = module(inputs["input_ids"][longest][mask.any(1)], inputs["attention_mask"][longest][mask.any(1)])
    assert columns["answer"][longest] == logits.mean(0).argmax()
    assert task.card(subject).detail["in_windows"] >= 1
    assert {tensor.shape for tensor in task.batch(subject, 3).values()} == {(3, 8)}


def test_texts_that_are_cut_short_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    task = from_csv(tmp_path, [{"text": row["text"] + " = 1 = 2 = 3 = 4 = 5", "label": row["label"]} for row in rows()])
    subject = Subject(torch.nn.Identity(), "own", kind="module", tokenizer=tokenizer)
    assert task.card(subject).detail["cut_short"] == len(task.sides.evaluation)
