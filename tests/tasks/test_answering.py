"""Texts that answer texts: scores as the libraries give them, data in the formats that people have, and faults by file and row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.data.sides import Asked
from optkit.engines import engine_for
from optkit.models.networks.encoder import Encoder
from optkit.models.networks.seq2seq import Seq2Seq
from optkit.models.sources import reference_tokenizer
from optkit.tasks.answering import Answering, PairFiles
from optkit.tasks.question_answering import QuestionAnswering, SquadFiles
from optkit.tasks.spans import spans
from optkit.tasks.summarization import Summarization
from optkit.tasks.translation import ParallelFiles, Translation

LINES = [(f"x + {number}", f"if x = {number} : return") for number in range(60)]


def parallel(folder: Path, lines: list[tuple[str, str]] = LINES) -> Translation:
    paths = [folder / "own.en", folder / "own.de"]
    for path, column in zip(paths, zip(*lines, strict=True), strict=True):
        path.write_text("".join(line + "\n" for line in column))
    return Translation(corpus=ParallelFiles(source_file=str(paths[0]), target_file=str(paths[1])), answer_tokens=8)


def subject_for(task: Answering, tokenizer: Any) -> Subject:
    torch.manual_seed(3)
    module = Seq2Seq(hidden_size=16, layers=1, heads=2, intermediate_size=16).build(task.needs(tokenizer)).eval()
    return Subject(module, "seq2seq", kind="seq2seq-lm", tokenizer=tokenizer)


def score(task: Answering, name: str, columns: Any) -> float:
    metric = next(metric for metric in task.metrics() if metric.name == name)
    return float(metric.estimate({key: column[None] for key, column in columns.items()})[0])


def test_bleu_and_chrf_are_those_of_sacrebleu(tmp_path: Path, tokenizer: Any) -> None:
    import sacrebleu

    task = parallel(tmp_path)
    given = [f"if x = {number} : pass and more" for number in range(len(task.sides.evaluation))]
    columns = {name: column.numpy() for name, column in task.judge(given, torch.arange(len(given))).items()}
    right = [item.answers[0] for item in task.sides.evaluation]
    assert score(task, "bleu", columns) * 100 == pytest.approx(sacrebleu.corpus_bleu(given, [right]).score)
    each = [sacrebleu.sentence_chrf(mine, [theirs]).score for mine, theirs in zip(given, right, strict=True)]
    assert score(task, "chrf", columns) * 100 == pytest.approx(np.mean(each))
    draws = {name: np.stack([column, column[::-1]]) for name, column in columns.items()}
    bleu = next(metric for metric in task.metrics() if metric.name == "bleu").estimate(draws)
    assert bleu.shape == (2,) and bleu[0] == pytest.approx(bleu[1])


def test_right_answers_score_one_in_every_task() -> None:
    for task, better in ((Translation(), "bleu"), (Summarization(), "rouge2"), (QuestionAnswering(), "f1")):
        found = [item for item in task.sides.evaluation if len(item.answers[0].split()) > 3 or better == "f1"]
        rows = [task.scores(item.answers[0], item) for item in found[:40]]
        columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
        names = [metric.name for metric in task.metrics() if metric.name in columns or metric.name == "bleu"]
        assert better in names
        assert {name: score(task, name, columns) for name in names} == pytest.approx(
            {name: float(name != "length_error") for name in names}
        )


def test_answers_are_held_to_the_nearest_of_the_right_ones() -> None:
    row = QuestionAnswering().scores("the Old town", Asked("Where?", ("a new city", "old town!")))
    assert row == {"f1": 1.0, "exact_match": 1.0}
    assert QuestionAnswering().scores("town", Asked("Where?", ("old town", "new")))["f1"] == pytest.approx(2 / 3)


def test_evaluated_in_two_ranks_and_against_itself_the_answers_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    task = parallel(tmp_path)
    subject = subject_for(task, tokenizer)
    kept = tmp_path / "kept"
    kept.mkdir()
    whole = task.evaluate(subject, engine_for(subject), Group(), None, kept)
    again = task.evaluate(subject, engine_for(subject), Group(), kept, None)
    assert again["same"].tolist() == [1.0] * len(task.sides.evaluation)
    assert score(task, "perplexity", whole) == score(task, "perplexity", again) > 1
    other = subject_for(task, tokenizer)
    other.module.lm_head.weight.data.normal_()  # type: ignore[union-attr,operator]
    changed = task.evaluate(other, engine_for(other), Group(), kept, None)
    assert score(task, "agreement", changed) < 1


def test_an_answer_ends_where_the_model_ends_it(tmp_path: Path, tokenizer: Any) -> None:
    task = parallel(tmp_path)

    class Script:
        def first(self, request: Any) -> Any:
            return torch.tensor([5, 0])

        def further(self, tokens: Any, count: int) -> Any:
            yield torch.tensor([6, 7])
            yield torch.tensor([0, 7])
            raise AssertionError("all answers have ended")

        def reset(self) -> None:
            pass

    assert task._generated(Script(), {}, 0).tolist() == [[5, 6, 0, 0, 0, 0, 0, 0], [0] * 8]


def test_requests_for_timing_hold_no_answer(tmp_path: Path, tokenizer: Any) -> None:
    task = parallel(tmp_path)
    batch = task.batch(subject_for(task, tokenizer), 30)
    assert set(batch) == {"input_ids", "attention_mask"} and len(batch["input_ids"]) == 30
    examples = task.examples("training", tokenizer)
    assert examples.inputs["labels"][0].tolist().count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_hold_the_same_pairs_as_parallel_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own.{suffix}"
    rows = [{"en": source, "de": target} for source, target in LINES]
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["en", "de"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    task = Translation(corpus=PairFiles(files=(str(path),), source="en", target="de"))
    assert task.sides.evaluation == parallel(tmp_path).sides.evaluation
    assert Summarization(corpus=PairFiles(files=(str(path),), source="en", target="de")).sides.training == task.sides.training


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "own.de").write_text("only one\n"), "has 60 lines and .*own.de has 1; lines must translate one another"),
        (lambda folder: (folder / "own.en").write_bytes(b"caf\xe9\n" * 60), "own.en is not UTF-8 text: byte 3 is 0xe9"),
        (lambda folder: (folder / "own.de").write_text("a\n" * 59 + "  \n"), "own.en row 60 has an empty answer"),
        (lambda folder: (folder / "own.en").unlink(), "own.en' matches no file"),
    ],
    ids=["uneven", "latin-1", "empty", "missing"],
)
def test_faults_of_parallel_files_are_told_with_their_row(tmp_path: Path, change: Callable[[Path], Any], told: str) -> None:
    task = parallel(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=told):
        task.look()


def test_squad_files_are_answered_where_there_is_an_answer(tmp_path: Path) -> None:
    asked = [
        {"id": str(n), "question": f"Which {n}?", "answers": [{"text": f"{n}", "answer_start": 0}] if n % 2 else []} for n in range(80)
    ]
    path = tmp_path / "train-v2.0.json"
    paragraphs = [{"context": f"{n} is the number", "qas": [question]} for n, question in enumerate(asked)]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    task = QuestionAnswering(corpus=SquadFiles(files=(str(path),)))
    items = [item for side in ("training", "validation", "calibration", "evaluation") for item in task.sides.of(side)]  # type: ignore[arg-type]
    assert len(items) == 40 and any(item.text == "Which 3?" and item.answers == ("3",) for item in items)


def test_marked_answers_are_the_pieces_of_the_text_that_were_meant() -> None:
    task, tokenizer = QuestionAnswering(), reference_tokenizer()
    examples = task.examples("evaluation", tokenizer)
    hot = torch.nn.functional.one_hot(examples.answers[:, :2].clamp_min(0), task.text_tokens).float()
    output = SimpleNamespace(start_logits=hot[:, 0], end_logits=hot[:, 1])
    known = (examples.answers[:, 0] >= 0).nonzero().flatten().tolist()
    items = [task.sides.evaluation[row] for row in examples.answers[:, 2].tolist()]
    texts, _ = spans(output, items, tokenizer, task.text_tokens, task.answer_tokens)
    scores = [task.scores(texts[row], items[row])["exact_match"] for row in known]
    assert len(known) > 900 and np.mean(scores) > 0.95


def test_an_encoder_marks_answers_and_a_model_that_writes_is_told_to(tokenizer: Any) -> None:
    task = QuestionAnswering(items=20)
    module = Encoder(hidden_size=16, layers=1, heads=2, intermediate_size=16).build(task.needs(reference_tokenizer())).eval()
    subject = Subject(module, "encoder", kind="module", tokenizer=reference_tokenizer())
    columns = task.evaluate(subject, engine_for(subject), Group(), None, None)
    assert len(columns["f1"]) == 20 and score(task, "perplexity", columns) > 1
    other = replace(subject, kind="seq2seq-lm")
    with pytest.raises(DataError, match="form: write"):
        task.judged(other, None, {}, task.examples("evaluation", reference_tokenizer()).answers)
