"""Workloads that processes import by name: a small classifier, and functions that go wrong in every way a worker can."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn

from optkit.core.errors import DataError
from optkit.tasks.loader import Batch, LoaderTask

CLASSES = 4


class Classifier(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.last = nn.Linear(128, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(points)))


def classifier(pause_s: float = 0.0) -> tuple[nn.Module, LoaderTask]:
    """A classifier that sees its own labels, blurred; each batch takes some time to be judged."""
    torch.manual_seed(0)
    module = Classifier()
    points = torch.randn(4, 16, 64)
    with torch.inference_mode():
        labels = module(points + 0.3 * torch.randn_like(points)).argmax(-1)
    batches = tuple({"points": one.clone(), "labels": label.clone()} for one, label in zip(points, labels, strict=True))

    def right(output: Tensor, batch: Batch) -> Tensor:
        time.sleep(pause_s)
        return (output.argmax(-1) == batch["labels"]).float()

    return module, LoaderTask(batches=batches, inputs=("points",), score=right, metric="accuracy", unit="share")


def slow_classifier() -> tuple[nn.Module, LoaderTask]:
    """The same, with time to be interrupted while it is judged."""
    return classifier(pause_s=0.1)


def undefined() -> tuple[nn.Module, LoaderTask]:
    """A classifier with a score that is not a number for some items."""
    module, task = classifier()
    return module, task.model_copy(update={"score": lambda output, batch: output[:, 0].masked_fill(batch["labels"] == 0, float("nan"))})


def sleeps() -> None:
    """Never come back."""
    time.sleep(600)


def refuses() -> None:
    raise DataError("this data cannot be used; give other data")


def fails() -> None:
    raise ValueError("a mistake of ours")


def exhausts() -> None:
    raise MemoryError


def allocates() -> None:
    torch.empty(2**60)


def crashes() -> None:
    os._exit(7)


def returns_nonsense() -> int:
    return 3
