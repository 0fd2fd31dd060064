"""Perplexity and fidelity, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.measurement import Samples
from optkit.core.subject import Subject
from optkit.engines import engine_for
from optkit.tasks import TASKS
from optkit.tasks.answers import Answers, kept_positions
from optkit.tasks.language_modeling import LanguageModeling, TextFiles

Subjects = Callable[..., Subject]
WORDS = ["def", "return", "x", "y", "z", "(", ")", ":", "=", "+", "for", "in", "0", "1"]


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., LanguageModeling]:
    """Return a function that makes a task over forty documents of random words."""
    draw = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(" ".join(draw.choice(WORDS, size=50)))
    corpus = TextFiles(files=(str(tmp_path / "*.txt"),))
    return lambda **settings: LanguageModeling(corpus=corpus, **({"window": 16} | settings))


def judge(task: LanguageModeling, subject: Subject, reference: Path | None = None, keep: Path | None = None) -> Samples:
    return task.evaluate(subject, engine_for(subject), Group(), reference, keep)


def values(task: LanguageModeling, samples: Samples) -> dict[str, float]:
    whole = {name: column[None] for name, column in samples.items()}
    return {metric.name: float(metric.estimate(whole)[0]) for metric in task.metrics() if not metric.relative or "kept" in samples}


def evaluated(task: LanguageModeling, subject: Subject) -> Tensor:
    return task._evaluated(subject)[1]


@torch.inference_mode()
def plain_loop(subject: Subject, windows: Tensor, first: int) -> tuple[float, float]:
    """Return perplexity and accuracy, one window and one position after the other, in float64."""
    nats, hits, count = 0.0, 0, 0
    for window in windows:
        for position in range(first, len(window)):
            logits = subject.module(input_ids=window[None, :position], use_cache=False).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[window[position]])
            hits += int(logits.argmax() == window[position])
            count += 1
    return math.exp(nats / count), hits / count


@pytest.mark.parametrize("stride", [None, 4, 16, 40])
def test_perplexity_and_accuracy_are_those_of_a_plain_loop(
    task: Callable[..., LanguageModeling], subject: Subjects, stride: int | None
) -> None:
    whole, judged = subject(), task(stride=stride, tokens=96)
    windows = evaluated(judged, whole)
    first = {None: 1, 4: 12, 16: 1, 40: 1}[stride]
    found = values(judged, judge(judged, whole))
    perplexity, accuracy = plain_loop(whole, windows, first)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert found["token_accuracy"] == pytest.approx(accuracy)


def test_bits_per_byte_count_the_bytes_of_the_scored_text(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    whole, judged = subject(), task(tokens=64)
    samples = judge(judged, whole)
    texts = [whole.tokenizer.decode(window[1:], skip_special_tokens=True) for window in evaluated(judged, whole)]
    assert samples["bytes"].tolist() == [len(text.encode()) for text in texts]
    assert values(judged, samples)["bits_per_byte"] == pytest.approx(samples["nats"].sum() / math.log(2) / samples["bytes"].sum())


def test_windows_step_by_the_stride_and_cover_the_stream(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    whole = subject()
    apart, close = evaluated(task(tokens=10**6), whole), evaluated(task(tokens=10**6, stride=4), whole)
    assert torch.equal(close[0, 4:], close[1, :-4])
    assert torch.equal(apart[:50], close[::4][:50])
    assert apart.shape[1] == close.shape[1] == 16


def test_no_more_tokens_than_asked_are_evaluated_and_they_are_spread(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    whole = subject()
    everything, some = evaluated(task(tokens=10**6), whole), evaluated(task(tokens=100), whole)
    assert len(some) == 6
    assert torch.equal(some[0], everything[0])
    assert torch.equal(some[-1], everything[-1])


def test_a_model_with_fewer_positions_gets_shorter_windows(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    judged = task(window=512)
    card = judged.card(subject(max_position_embeddings=32))
    assert (card.detail["window"], card.detail["stride"], card.items) == (32, 32, card.detail["windows"] * 32)


def test_against_itself_a_model_differs_in_nothing(task: Callable[..., LanguageModeling], subject: Subjects, tmp_path: Path) -> None:
    whole, judged = subject(), task(tokens=128)
    answers = tmp_path / "answers"
    answers.mkdir()
    before = judge(judged, whole, keep=answers)
    after = judge(judged, whole, reference=answers)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    found = values(judged, after)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-7)
    assert found["top1_agreement"] == 1
    assert found["greedy_match"] == 1


def test_against_another_model_divergence_and_agreement_are_those_of_a_plain_loop(
    task: Callable[..., LanguageModeling], subject: Subjects, tmp_path: Path
) -> None:
    one, other, judged = subject(0), subject(1), task(tokens=64)
    answers = tmp_path / "answers"
    answers.mkdir()
    judge(judged, one, keep=answers)
    found = values(judged, judge(judged, other, reference=answers))
    windows = evaluated(judged, one)
    with torch.inference_mode():
        before, after = (model.module(input_ids=windows).logits[:, :-1].double() for model in (one, other))
    divergence = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
    assert found["kl_divergence"] == pytest.approx(float(divergence), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    assert found["greedy_match"] < 0.5


def test_ranks_that_share_the_work_give_the_same_answer(
    task: Callable[..., LanguageModeling], subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, judged = subject(), task(tokens=80)
    folders = [tmp_path / "alone", tmp_path / "shared"]
    for folder in folders:
        folder.mkdir()
    alone = judge(judged, whole, keep=folders[0])
    size = len(alone["nats"]) + 2  # two ranks have no window of their own
    shares: dict[str, list[list[Any]]] = {"greedy": [], "scored": []}
    for rank in range(size):
        calls: list[list[Any]] = []
        monkeypatch.setattr(Group, "join", lambda self, rows, calls=calls: calls.append(list(rows)) or list(rows))
        with pytest.raises(IndexError) if rank >= size - 2 else nullcontext():  # joined alone, nothing makes no columns
            judged.evaluate(whole, engine_for(whole), Group(rank, size), None, None)
        shares["greedy"].append(calls[0])
        shares["scored"].append(calls[1])
    monkeypatch.setattr(Group, "join", lambda self, rows: list(chain(*shares["greedy" if np.ndim(rows) == 2 else "scored"])))
    for rank in range(size):
        shared = judged.evaluate(whole, engine_for(whole), Group(rank, size), None, folders[1])
        assert shared["nats"] == pytest.approx(alone["nats"])
    one, other = Answers.read(folders[0]), Answers.read(folders[1])
    assert torch.equal(one.top1, other.top1)
    assert torch.equal(one.greedy, other.greedy)


def test_calibration_shares_no_window_with_the_evaluation(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    whole, judged = subject(), task(tokens=10**6)
    batches = judged.calibration(whole).batches
    calibrated = {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
    assert all(batch["input_ids"].shape[1] == 16 for batch in batches)
    assert 1 <= len(calibrated) <= 32
    assert not calibrated & {tuple(row.tolist()) for row in evaluated(judged, whole)}


def test_calibration_gives_as_many_windows_as_are_asked_for_or_all_there_are(
    task: Callable[..., LanguageModeling], subject: Subjects
) -> None:
    def windows(items: int) -> set[tuple[int, ...]]:
        rows = torch.cat([batch["input_ids"] for batch in task().calibration(subject(), items).batches])
        assert len(rows) <= items
        return {tuple(row.tolist()) for row in rows}

    everything = windows(10**6)
    assert len(windows(2)) == 2 < len(everything)
    assert windows(2) <= everything


def test_prompts_are_beginnings_of_windows_and_repeat_when_there_are_few(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    whole = subject()
    windows = {tuple(row.tolist()) for row in evaluated(task(window=24, tokens=10**6), whole)}
    prompts = task().prompts(whole, 4, 24)
    assert prompts.shape == (4, 24)
    assert {tuple(row.tolist()) for row in prompts} <= windows
    assert task().prompts(whole, 500, 32).shape == (500, 32)


def test_without_a_tokenizer_prompts_are_the_same_random_ids_and_quality_is_withheld(
    task: Callable[..., LanguageModeling], subject: Subjects
) -> None:
    mute = replace(subject(), tokenizer=None)
    prompts = task().prompts(mute, 3, 10)
    assert torch.equal(prompts, task().prompts(mute, 3, 10))
    assert prompts.max() < 96
    assert task().withheld(mute) == "the model has no tokenizer"
    assert task().withheld(replace(subject(), trained=False)) == "the weights are random"
    assert task().withheld(subject()) is None
    with pytest.raises(DataError, match="has no tokenizer, so no text can be given to it"):
        task().card(mute)


def test_every_document_begins_with_the_special_token(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    windows = evaluated(task(window=51, tokens=10**6), subject())
    assert (windows[:, 0] == 0).all()
    assert (windows[:, 1:] != 0).all()


def test_a_corpus_without_text_for_calibration_is_refused_only_then(subject: Subjects, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x y z")
    task = LanguageModeling(corpus=str(tmp_path / "a.txt"))
    task.card(subject())
    with pytest.raises(DataError, match="too little text to set some aside for calibration"):
        task.calibration(subject())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(task: Callable[..., LanguageModeling], subject: Subjects) -> None:
    with pytest.raises(DataError, match=r"gives token \d+, and the model knows 8: they do not belong together"):
        task().card(subject(vocab_size=8))


def test_an_empty_file_is_refused(subject: Subjects, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"corpus 'a.txt' is empty"):
        LanguageModeling(corpus=str(tmp_path / "a.txt")).card(subject())


@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"tokens": 0}, {"stride": 0}, {"corpus": 3}, {"corpus": {"files": ()}}, {"windows": 5}], ids=repr
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LanguageModeling(**settings)


def test_the_card_changes_with_the_text_and_not_with_the_model(
    task: Callable[..., LanguageModeling], subject: Subjects, tmp_path: Path
) -> None:
    before = task().card(subject(0))
    assert task().card(subject(1)) == before
    (tmp_path / "00.txt").write_text("x = 1")
    assert task().card(subject(0)).sha256 != before.sha256


def test_kept_positions_stay_within_the_budget_and_the_window() -> None:
    assert kept_positions(4, 15, 96).tolist() == list(range(15))
    few = kept_positions(128, 511, 50_000)
    assert 1 <= len(few) * 128 * 50_000 * 4 <= 256 * 2**20
    assert few.min() >= 0
    assert few.max() <= 510
    assert kept_positions(10**6, 511, 50_000).tolist() == [0]


def test_answers_of_all_ranks_are_read_in_order(tmp_path: Path) -> None:
    for rank in (1, 0, 10):
        part = torch.full((2, 3), rank)
        Answers(part.int(), part[..., None].float(), part).write(tmp_path, rank)
    assert Answers.read(tmp_path).top1[:, 0].tolist() == [0, 0, 1, 1, 10, 10]


def test_the_registry_knows_the_task() -> None:
    assert TASKS["language-modeling"] is LanguageModeling


def test_a_corpus_is_read_once_by_a_task_and_its_copies_and_by_no_other(
    task: Callable[..., LanguageModeling], subject: Subjects, tmp_path: Path
) -> None:
    one, model = task(), subject()
    before = one._evaluated(model)
    for path in tmp_path.glob("3*.txt"):
        path.unlink()
    copy = one.model_copy(update={"tokens": 64})
    torch.testing.assert_close(one._evaluated(model)[1], before[1], rtol=0, atol=0)
    assert copy._evaluated(model)[0] is before[0]
    assert len(task()._evaluated(model)[1]) < len(before[1])
    other = one.model_copy(update={"corpus": TextFiles(files=(str(tmp_path / "1*.txt"),))})
    assert other._evaluated(model)[0].sha256 != before[0].sha256
