"""Going on with texts: predictions as language modeling has them, continuations as sacrebleu judges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines import engine_for
from optkit.models.networks.gpt2 import Gpt2
from optkit.tasks.language_modeling import TextFiles
from optkit.tasks.text_generation import TextGeneration, distinct


def own(folder: Path, **changes: Any) -> TextGeneration:
    text = "".join(f"def x ( y , {n % 2} ) : return {n % 2} + x\n" for n in range(400))
    (folder / "own.py").write_text(text)
    return TextGeneration(corpus=TextFiles(files=(str(folder / "own.py"),)), window=24, prompt_tokens=8, answer_tokens=8, **changes)


def subject_for(task: TextGeneration, tokenizer: Any) -> Subject:
    module = Gpt2(hidden_size=16, layers=1, heads=2).build(task.needs(tokenizer)).eval()
    return Subject(module, "gpt2", kind="causal-lm", tokenizer=tokenizer)


def test_one_long_text_has_four_sides_and_windows_of_one_length(tmp_path: Path, tokenizer: Any) -> None:
    task = own(tmp_path, windows=10)
    assert task.examples("evaluation", tokenizer).answers.shape == (10, 24)
    assert len(task.examples("training", tokenizer)) > 100


def test_the_perplexity_is_that_of_the_models_own_loss(tmp_path: Path, tokenizer: Any) -> None:
    task = own(tmp_path)
    subject = subject_for(task, tokenizer)
    columns = task.evaluate(subject, engine_for(subject), Group(), None, None)
    ids = task.examples("evaluation", tokenizer).answers
    with torch.inference_mode():
        loss = subject.module(input_ids=ids, labels=ids).loss
    perplexity = next(metric for metric in task.metrics() if metric.name == "perplexity")
    assert float(perplexity.estimate({name: column[None] for name, column in columns.items()})[0]) == pytest.approx(
        float(loss.exp()), rel=1e-4
    )


def test_against_itself_all_continuations_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    task = own(tmp_path)
    subject = subject_for(task, tokenizer)
    kept = tmp_path / "kept"
    kept.mkdir()
    task.evaluate(subject, engine_for(subject), Group(), None, kept)
    again = task.evaluate(subject, engine_for(subject), Group(), kept, None)
    assert again["same"].tolist() == [1.0] * len(task.examples("evaluation", tokenizer))


def test_what_stands_there_is_a_perfect_continuation() -> None:
    text = ["return x + y\nmore", "if a :"]
    columns = TextGeneration().judge(text, text)
    assert columns["chrf"].tolist() == [1, 1] and columns["exact_match"].tolist() == [1, 1] and columns["length_error"].tolist() == [0, 0]
    other = TextGeneration().judge(["return x + y\nless"], ["return x + y\nmore"])
    assert other["exact_match"].tolist() == [1] and other["chrf"][0] < 1


@pytest.mark.parametrize(("words", "length", "share"), [("a b a b", 1, 0.5), ("a b a b", 2, 2 / 3), ("a", 2, 1.0), ("", 1, 1.0)])
def test_distinct_counts_each_ngram_once(words: str, length: int, share: float) -> None:
    assert distinct(words.split(), length) == pytest.approx(share)


def test_many_documents_are_parted_and_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"x = {n}"}) + "\n" for n in range(200)))
    task = TextGeneration(corpus=TextFiles(files=(str(path),)))
    sides = [task.sides.of(side) for side in ("training", "validation", "calibration", "evaluation")]
    assert sum(map(len, sides)) == 200 and len({text for side in sides for text in side}) == 200


def test_the_standard_library_has_no_file_on_two_sides() -> None:
    sides = TextGeneration().sides
    texts = [set(sides.of(side)) for side in ("training", "validation", "calibration", "evaluation")]
    assert sum(map(len, texts)) == len(set.union(*texts)) and np.argmax([len(side) for side in texts]) == 0
