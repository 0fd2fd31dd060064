"""A task from Python for any module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines import engine_for
from optkit.tasks.loader import LoaderTask
from optkit.transforms import Int8, Magnitude


class Classifier(nn.Module):
    """Three classes from 64 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(features)))  # type: ignore[no-any-return]


def right(output: Tensor, batch: Any) -> Tensor:
    return output.argmax(-1) == batch["label"]  # type: ignore[no-any-return]


@pytest.fixture
def made() -> tuple[Subject, LoaderTask]:
    module = Classifier().eval()
    features = torch.randn(5, 4, 64)
    batches = tuple({"features": one, "label": module(one).argmax(-1)} for one in features)
    wrong = {"features": features[0], "label": (batches[0]["label"] + 1) % 3}
    task = LoaderTask(batches=(*batches[1:], wrong), calibration_batches=batches[:1], inputs=("features",), score=right, metric="accuracy")
    return Subject(module=module, source="classifier", kind="module"), task


def accuracy(task: LoaderTask, subject: Subject) -> float:
    samples = task.evaluate(subject, engine_for(subject), Group(), None, None)
    (metric,) = task.metrics()
    assert metric.each(samples).shape == (20,)
    return float(metric.estimate({name: column[None] for name, column in samples.items()})[0])


def test_the_score_is_the_mean_over_all_items(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    assert accuracy(task, subject) == pytest.approx(16 / 20)


def test_a_transformed_module_is_judged_by_the_same_items(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    assert accuracy(task, Int8().apply(deepcopy(subject))) == pytest.approx(0.8, abs=0.11)
    assert accuracy(task, Magnitude(sparsity=0.98).apply(deepcopy(subject))) < 0.75


def test_calibration_holds_the_inputs_and_no_labels(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    (batch,) = task.calibration(subject).batches
    assert set(batch) == {"features"}


@pytest.mark.parametrize("size", [1, 7, 20, 33])
def test_a_batch_for_timing_has_the_size_that_was_asked_for(made: tuple[Subject, LoaderTask], size: int) -> None:
    subject, task = made
    batch = task.batch(subject, size)
    assert batch["features"].shape == (size, 64)
    assert torch.equal(batch["features"][0], task.batches[0]["features"][0])
    assert subject.module(**batch).shape == (size, 3)


def test_the_card_tells_data_apart(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    card = task.card(subject)
    assert (card.items, card.corpus) == (20, "accuracy")
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x + 1e-6,
        lambda x: x.bfloat16(),
        lambda x: x.reshape(64, 4),
        lambda x: x.flip(0),
    ]
    digests = {card.sha256}
    for change in changes:
        first = {**task.batches[0], "features": change(task.batches[0]["features"])}
        digests.add(task.model_copy(update={"batches": (first, *task.batches[1:])}).card(subject).sha256)
    assert len(digests) == 5


def test_a_task_without_batches_is_refused(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    with pytest.raises(DataError, match="no batches to evaluate"):
        task.model_copy(update={"batches": ()}).card(subject)


def test_ranks_share_the_batches(made: tuple[Subject, LoaderTask], monkeypatch: pytest.MonkeyPatch) -> None:
    subject, task = made
    whole = task.evaluate(subject, engine_for(subject), Group(), None, None)["score"].tolist()
    monkeypatch.setattr(Group, "join", lambda self, rows: list(rows))
    parts = [task.evaluate(subject, engine_for(subject), Group(rank, 3), None, None)["score"].tolist() for rank in range(3)]
    assert [score for part in parts for score in part] == whole


def test_it_has_no_prompts(made: tuple[Subject, LoaderTask]) -> None:
    subject, task = made
    with pytest.raises(TypeError, match="LoaderTask has no prompts"):
        task.prompts(subject, 1, 1)
