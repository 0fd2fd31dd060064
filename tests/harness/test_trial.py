"""Who works when: the arms take turns, everyone else stands still, and the measurement ends for a stated reason."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from optkit.core.measurement import Metric
from optkit.harness import trial
from optkit.harness.trial import MIN_ROUNDS, REFERENCE_EVERY, Schedule, Timed, columns_of, take_turns

TIME = Metric("pass_ms", "ms", False, lambda c: np.median(c["ms"].reshape(len(c["ms"]), -1), axis=-1), lambda c: c["ms"])
Turns = list[tuple[str, str]]


class Clock:
    """Time that passes only while someone works."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class StandIn:
    """Stands for the processes of one arm: writes down each turn and refuses to work while it, or nobody, should."""

    def __init__(self, name: str, turns: Turns, awake_now: list[str], clock: Clock, times: Iterator[float]) -> None:
        self.name, self._turns, self._awake, self._clock, self._times = name, turns, awake_now, clock, times

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._awake.append(self.name)
        yield
        self._awake.remove(self.name)

    def ask(self, do: str, deadline_s: float = 0, **arguments: Any) -> dict[str, Any]:
        assert self._awake == [self.name], "somebody else is awake"
        self._turns.append((do, self.name))
        self._clock.now += 1
        return {"warm_up_ms": 5.0} if do == "session" else {"ms": [next(self._times), next(self._times)]}


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Timed, Turns, list[tuple[str, float]]]]:
    clock = Clock()
    monkeypatch.setattr(trial, "time", clock)

    def run(seconds: float = 1000, precision: float = 0.02, blocks: int = 2, references: tuple[str, ...] = (), spread: float = 0.0) -> Any:
        turns: Turns = []
        awake: list[str] = []
        told: list[tuple[str, float]] = []
        draw = np.random.default_rng(0)

        def arm(name: str, level: float) -> Any:
            return StandIn(name, turns, awake, clock, (level * float(np.exp(draw.normal(0, spread))) for _ in itertools.count()))

        arms = {name: arm(name, level) for name, level in (("baseline", 10.0), ("optimized", 5.0), ("baseline-again", 10.0))}
        others = {name: arm(name, 20.0) for name in references}
        schedule = Schedule(4, blocks, TIME, precision, seconds)
        timed = take_turns(arms, others, schedule, {}, lambda doing, share: told.append((doing, share)))
        return timed, turns, told

    return run


@pytest.mark.parametrize("references", [(), ("bfloat16",)])
def test_no_arm_follows_itself_and_each_follows_every_other_equally_often(play: Any, references: tuple[str, ...]) -> None:
    timed, turns, _ = play(blocks=12, references=references)
    order = [name for do, name in turns if do == "block"]
    together = len(timed.rounds) * 12
    pairs = Counter(itertools.pairwise(order[: together + 1]))  # with the block that begins the next round
    assert len(pairs) == len(timed.rounds) * (len(timed.rounds) - 1)
    assert len(set(pairs.values())) == 1


def test_the_order_of_first_blocks_changes_from_round_to_round(play: Any) -> None:
    _, turns, _ = play(blocks=2)
    order = [name for do, name in turns if do == "block"]
    assert [order[at : at + 3] for at in (0, 6)] == [
        ["baseline", "optimized", "baseline-again"],
        ["baseline", "baseline-again", "optimized"],
    ]


def test_references_take_part_in_every_fourth_round(play: Any) -> None:
    timed, turns, _ = play(references=("bfloat16", "float32"), spread=0.1, precision=0.001, seconds=130)
    rounds = len(timed.rounds["baseline"])
    assert rounds > REFERENCE_EVERY + 1
    assert len(timed.rounds["bfloat16"]) == len(timed.rounds["float32"]) == -(-rounds // REFERENCE_EVERY)
    assert [turn for turn in turns if turn[0] == "session"] == [("session", name) for name in timed.rounds]


def test_a_round_has_all_blocks_in_the_order_they_were_taken(play: Any) -> None:
    timed, _, _ = play(blocks=3)
    assert all(len(one["ms"]) == 6 for one in timed.rounds["optimized"])
    assert timed.columns("optimized")["ms"].shape == (len(timed.rounds["optimized"]), 6)


def test_it_ends_when_the_ratio_is_known_but_not_before_six_rounds(play: Any) -> None:
    timed, _, _ = play()
    assert len(timed.rounds["baseline"]) == MIN_ROUNDS
    assert timed.stopped_because == "pass_ms known within 2.0%"


def test_it_ends_when_the_time_is_spent_and_says_how_well_the_ratio_is_known(play: Any) -> None:
    timed, _, told = play(seconds=60, spread=0.3)
    assert timed.stopped_because.startswith("time budget of 60 s spent; pass_ms known within ")
    assert len(timed.rounds["baseline"]) == 10
    assert told[-1] == ("timing, batch 4: round 10", 1.0)


def test_a_spent_budget_waits_for_six_rounds_up_to_twice_the_time(play: Any) -> None:
    timed, _, _ = play(seconds=20, spread=0.3)
    assert len(timed.rounds["baseline"]) == MIN_ROUNDS
    short, _, _ = play(seconds=5, spread=0.3)
    assert len(short.rounds["baseline"]) == 2


def test_one_round_is_never_enough(play: Any) -> None:
    timed, _, _ = play(seconds=0.1)
    assert len(timed.rounds["baseline"]) == 2


def test_warm_up_is_kept_apart(play: Any) -> None:
    timed, _, told = play(references=("float32",))
    assert timed.warm_up_ms == dict.fromkeys(("baseline", "optimized", "baseline-again", "float32"), 5.0)
    assert told[0] == ("warming up baseline", 0.0)


def test_an_arm_that_fails_is_put_to_rest() -> None:
    turns: Turns = []

    class Failing(StandIn):
        @contextmanager
        def awake(self) -> Iterator[None]:
            try:
                yield
            finally:
                turns.append(("rest", self.name))

        def ask(self, do: str, deadline_s: float = 0, **arguments: Any) -> dict[str, Any]:
            raise ValueError("broken")

    arm: Any = Failing("baseline", turns, [], Clock(), iter(()))
    with pytest.raises(ValueError, match="broken"):
        take_turns({"baseline": arm}, {}, Schedule(1, 1, TIME, 0.1, 1), {}, lambda doing, share: None)
    assert turns == [("rest", "baseline")]


def test_columns_are_rounds_by_times() -> None:
    columns = columns_of([{"a": [1.0, 2.0], "b": [3.0]}, {"a": [4.0, 5.0], "b": [6.0]}])
    assert columns["a"].tolist() == [[1, 2], [4, 5]]
    assert columns["b"].tolist() == [[3], [6]]
