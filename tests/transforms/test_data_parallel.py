"""Placement on several processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Subject
from optkit.transforms import DataParallel, Plan


def test_the_subject_knows_its_ranks_and_the_module_is_the_same(subject: Callable[..., Subject]) -> None:
    whole = subject()
    placed = DataParallel(size=3).apply(whole)
    assert placed.mesh == Mesh(data=3)
    assert placed.module is whole.module


def test_batches_that_leave_ranks_without_work_are_refused(subject: Callable[..., Subject]) -> None:
    with pytest.raises(
        TransformError, match=r"4 ranks have no work with batches of 2; measure.latency.batch_sizes needs one of at least 4"
    ):
        DataParallel(size=4).check(Plan(subject(), batch_sizes=(1, 2)))
    DataParallel(size=4).check(Plan(subject(), batch_sizes=(1, 4)))


def test_a_second_placement_is_refused(subject: Callable[..., Subject]) -> None:
    placed = DataParallel(size=2).apply(subject())
    with pytest.raises(TransformError, match="has data_parallel over 2 ranks already"):
        DataParallel(size=2).check(Plan(placed, batch_sizes=(8,)))


def test_a_bare_module_has_no_place() -> None:
    with pytest.raises(TransformError, match="bare module has no place"):
        DataParallel().apply(nn.Linear(2, 2))


@pytest.mark.parametrize("size", [0, 1, 65])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(size: int) -> None:
    with pytest.raises(ValidationError):
        DataParallel(size=size)
