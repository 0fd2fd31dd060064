"""Which arms are opened beside one another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from optkit.harness.hosts import HERE
from optkit.harness.stages import Stages

NAMES = ["baseline", "optimized", "baseline-again", "one-process", "step-1", "bfloat16"]
GIB = 2**30


@pytest.mark.parametrize(
    ("free_gib", "left_out"),
    [
        (100, []),
        (20.0, ["bfloat16"]),
        (13.0, ["one-process", "step-1", "bfloat16"]),
        (1.0, ["one-process", "step-1", "bfloat16"]),  # what is compared is tried all the same
    ],
)
def test_arms_that_memory_does_not_hold_are_left_out_the_last_ones_first(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, left_out: list[str]
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gib * GIB))
    stages: Any = Stages.__new__(Stages)
    stages._hosts, stages._recipe = HERE, SimpleNamespace(device="cpu")
    stages._size = lambda name: 3 * GIB
    ranks = dict.fromkeys(NAMES, 1) | {"optimized": 2}
    assert stages._unaffordable(NAMES, ranks) == left_out
    stages._recipe = SimpleNamespace(device="cuda")
    assert stages._unaffordable(NAMES, ranks) == []
