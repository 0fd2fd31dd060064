"""The timed part of a trial: arms take turns block by block until the ratio is known well enough or the time is spent.

No arm follows itself and each follows every other equally often, because whoever has just worked still has its weights in the cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optkit.core.measurement import Metric, Samples
from optkit.harness.processes import Workers
from optkit.harness.statistics import ratio

MIN_ROUNDS = 6
REFERENCE_EVERY = 4
LEAST_DEADLINE_S, SLOWER = 20.0, 20.0  # a block may take so many times what a whole request took at first

Progress = Callable[[str, float], None]
"""Told what is being done, and the share that is done."""


@dataclass(frozen=True)
class Schedule:
    """How long to measure. ``judged`` is the metric whose ratio decides."""

    batch_size: int
    blocks_per_round: int
    judged: Metric
    precision: float
    seconds: float


@dataclass
class Timed:
    """What came out: for each arm its columns, a row a round, and why the measurement ended."""

    rounds: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    stopped_because: str = ""
    warm_up_ms: dict[str, float] = field(default_factory=dict)

    def columns(self, arm: str) -> Samples:
        """Return one arm's samples."""
        return columns_of(self.rounds[arm])


def columns_of(rounds: Sequence[Mapping[str, list[float]]]) -> Samples:
    """Return (rounds, times) columns from one mapping a round."""
    return {name: np.array([one[name] for one in rounds]) for name in rounds[0]}


def take_turns(
    arms: dict[str, Workers], references: dict[str, Workers], schedule: Schedule, recipe: dict[str, Any], progress: Progress
) -> Timed:
    """Measure all arms under one schedule. Every process but the one at work stands still.

    Args:
        arms: ``baseline``, ``optimized`` and ``baseline-again``, which take part in every round.
        references: further arms, which take part in every fourth round.
        schedule: how long.
        recipe: the recipe as plain data, for the sessions.
        progress: told after each round.
    """
    timed = Timed(rounds={name: [] for name in (*arms, *references)})
    for name, workers in (*arms.items(), *references.items()):
        progress(f"warming up {name}", 0.0)
        with workers.awake():
            answer = workers.ask("session", recipe=recipe, batch_size=schedule.batch_size)
        timed.warm_up_ms[name] = answer["warm_up_ms"]
    deadlines = {name: max(LEAST_DEADLINE_S, SLOWER * ms / 1e3) for name, ms in timed.warm_up_ms.items()}
    start = time.monotonic()
    number = 0
    while not timed.stopped_because:
        present = {**arms, **(references if number % REFERENCE_EVERY == 0 else {})}
        for name, one in _round(present, schedule, number, deadlines).items():
            timed.rounds[name].append(one)
        number += 1
        spent = time.monotonic() - start
        timed.stopped_because = _finished(timed, schedule, number, spent)
        progress(f"timing, batch {schedule.batch_size}: round {number}", min(1.0, spent / schedule.seconds))
    return timed


def _round(arms: dict[str, Workers], schedule: Schedule, number: int, deadlines: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    """Do one request on every arm, block by block. The first arm leads always, the others follow in each of their orders in turn."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    lead, *others = arms
    orders = list(itertools.permutations(others))
    for block in range(schedule.blocks_per_round):
        for name in (lead, *orders[(block + number) % len(orders)]):
            with arms[name].awake():
                answer = arms[name].ask("block", deadlines[name], batch_size=schedule.batch_size)
            for column, times in answer.items():
                found[name].setdefault(column, []).extend(times)
    return found


def _finished(timed: Timed, schedule: Schedule, number: int, spent: float) -> str:
    if number < MIN_ROUNDS and spent < 2 * schedule.seconds:
        return ""
    if number < 2:
        return ""
    before = timed.columns("baseline")
    widths = []
    for other in ("optimized", "baseline-again"):
        found = ratio(schedule.judged, before, timed.columns(other))
        widths.append(found.half_width if found else float("inf"))
    if number >= MIN_ROUNDS and max(widths) <= schedule.precision:
        return f"{schedule.judged.name} known within {schedule.precision:.1%}"
    if spent >= schedule.seconds:
        return f"time budget of {schedule.seconds:g} s spent; {schedule.judged.name} known within {max(widths):.1%}"
    return ""
