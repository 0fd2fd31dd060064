"""Requests that come when they come: queues are seen, limits find a rate, and twice of it is told as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optkit.measure.contract import Opened
from optkit.measure.requests import Request, arrivals, percentiles, requests_of, serve
from optkit.measure.scenarios import Assistant, Documents, scenarios_of


class Clock:
    """Time that passes with work alone, and while nobody comes."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        self.now += 1e-9
        return self.now


class Engine:
    """Takes a time for each prompt and a time for each token."""

    def __init__(self, wait: Any, prompt_s: float, token_s: float) -> None:
        self._wait, self._prompt_s, self._token_s = wait, prompt_s, token_s
        self.prompts: list[int] = []

    def first(self, ids: Tensor) -> Tensor:
        self.prompts.append(ids.shape[1])
        self._wait(self._prompt_s)
        return ids[:, 0]

    def further(self, tokens: Tensor, count: int) -> Iterator[Tensor]:
        for _ in range(count):
            self._wait(self._token_s)
            yield tokens

    def reset(self) -> None:
        pass


class Prompts:
    def prompts(self, subject: Any, count: int, length: int) -> Tensor:
        return torch.arange(count * length).view(count, length)


def by_clock(monkeypatch: pytest.MonkeyPatch, prompt_s: float, token_s: float) -> tuple[Clock, Engine]:
    clock = Clock()

    def wait(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(time, "sleep", wait)
    return clock, Engine(wait, prompt_s, token_s)


def test_the_first_token_counts_from_arrival_and_not_from_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, engine = by_clock(monkeypatch, 0.1, 0.02)
    requests = [Request(torch.ones(1, 4, dtype=torch.long), 6)] * 3
    served = serve(engine, requests, [0.0, 0.05, 5.0], clock)
    assert [round(one.ttft_ms) for one in served] == [100, 250, 100]  # the second waited until the first was done, at 0.2 s
    assert all(len(one.gaps_ms) == 5 and one.gaps_ms[0] == pytest.approx(20, abs=0.1) for one in served)
    assert [one.waiting for one in served] == [1, 1, 1]


def test_a_slow_server_cannot_hide_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, engine = by_clock(monkeypatch, 0.1, 0.01)
    requests = [Request(torch.ones(1, 4, dtype=torch.long), 11)] * 40  # 0.2 s each
    light, heavy = (percentiles(serve(engine, requests, arrivals(40, rate, 3), clock)) for rate in (1.0, 20.0))
    assert light["ttft_p90_ms"] < 500 and heavy["ttft_p90_ms"] > 4000
    assert light["longest_queue"] <= 4 and heavy["longest_queue"] > 20
    assert light["gap_p99_ms"] == pytest.approx(heavy["gap_p99_ms"], abs=0.1) == pytest.approx(10, abs=0.1)


def test_moments_come_from_the_seed_and_have_the_rate() -> None:
    assert arrivals(50, 2.0, 1) == arrivals(50, 2.0, 1) != arrivals(50, 2.0, 2)
    assert np.mean(np.diff(arrivals(4000, 2.0, 1))) == pytest.approx(0.5, rel=0.1)


def test_lengths_lie_between_their_ends_and_beginnings_are_shared() -> None:
    arm = Opened(None, None, Prompts())  # type: ignore[arg-type]
    found = requests_of(arm, 30, (4, 9), (2, 5), 3, seed=0)
    lengths = {one.prompt.shape[1] for one in found}
    assert lengths <= set(range(4, 10)) and len(lengths) > 3 and {one.new_tokens for one in found} <= {2, 3, 4, 5}
    assert len({tuple(one.prompt[0, :3].tolist()) for one in found}) == 1 and len({int(one.prompt[0, 3]) for one in found}) == 30


def test_an_assistant_finds_a_rate_that_holds_its_limits_and_tells_what_twice_of_it_does() -> None:
    arm = Opened(None, Engine(time.sleep, 0.002, 0.0005), Prompts())  # type: ignore[arg-type]
    meter = Assistant(requests=12, prompt_tokens=(4, 6), new_tokens=(2, 6), ttft_p90_ms=15, gap_p99_ms=1000)
    found = meter.serve(arm)
    assert set(found) == set(meter.units())
    assert 0 < found["assistant_rate"] < found["assistant_capacity"]
    assert found["assistant_ttft_p90_ms"] <= 15


def test_a_gap_that_is_always_too_long_leaves_no_rate() -> None:
    arm = Opened(None, Engine(time.sleep, 0.001, 0.003), Prompts())  # type: ignore[arg-type]
    assert Assistant(requests=8, prompt_tokens=(4, 4), new_tokens=(3, 3), gap_p99_ms=1).serve(arm)["assistant_rate"] == 0


def test_documents_are_written_some_at_once_and_cost_what_their_time_costs() -> None:
    engine = Engine(time.sleep, 0.001, 0.001)
    meter = Documents(documents=6, together=4, prompt_tokens=5, new_tokens=4, price_per_hour=3.6)
    found = meter.serve(Opened(None, engine, Prompts()))  # type: ignore[arg-type]
    assert len(engine.prompts) == 3 and set(found) == set(meter.units())
    assert found["documents_tokens_per_second"] == pytest.approx(24 / found["documents_seconds"])
    assert found["documents_cost_per_million"] == pytest.approx(1000 / found["documents_tokens_per_second"])
    assert set(scenarios_of({"documents": meter, "other": 1})) == {"documents"}
