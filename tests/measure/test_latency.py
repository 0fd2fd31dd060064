"""Times follow the field's definitions, blocks make up requests, and the tokens that only wake an engine are not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from optkit.core.errors import OptkitError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines.greedy import Greedy
from optkit.measure import METERS, latency, mixed
from optkit.measure.contract import Opened
from optkit.measure.latency import Latency


class Clock:
    """Time that only the engine lets pass, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowEngine(Greedy):
    """A prefill takes 50 ms, the n-th step since the last prefill n ms, a pass 7 ms."""

    def __init__(self, clock: Clock) -> None:
        self.calls: list[str] = []
        self._clock = clock
        self._steps = 0

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.calls.append("prefill")
        self._steps = 0
        self._clock.now += 0.050
        return torch.eye(8)[: len(input_ids)]

    def step(self, token_ids: Tensor) -> Tensor:
        self.calls.append("step")
        self._steps += 1
        self._clock.now += 0.001 * self._steps
        return torch.eye(8)[token_ids]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(f"pass of {len(batch['points'])}")
        self._clock.now += 0.007
        return batch["points"]


class Data:
    """Prompts and batches of zeros."""

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        return torch.zeros(count, length, dtype=torch.long)

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        return {"points": torch.zeros(size, 4)}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SlowEngine:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return SlowEngine(clock)


def opened(engine: SlowEngine, kind: Any = "causal-lm") -> Any:
    return Opened(Subject(nn.Identity(), "nothing", kind=kind), engine, Data())  # type: ignore[arg-type]


def request(meter: Latency, session: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for _ in range(meter.blocks_per_round(generates=True)):
        for name, times in session.block().items():
            found.setdefault(name, []).extend(times)
    return found


@pytest.mark.parametrize(("new_tokens", "counted"), [(2, 1), (3, 1), (9, 7), (10, 8), (11, 8), (12, 9), (19, 16), (64, 56), (128, 112)])
def test_the_blocks_of_a_round_make_one_request_each_time(engine: SlowEngine, new_tokens: int, counted: int) -> None:
    meter = Latency(new_tokens=new_tokens)
    session = meter.session(opened(engine), 1, Group())
    first, second = request(meter, session), request(meter, session)
    assert {name: len(times) for name, times in first.items()} == {name: len(times) for name, times in second.items()}
    assert len(first["ttft_ms"]) == 1
    assert len(first["gaps_ms"]) == counted
    assert engine.calls.count("step") == 2 * (new_tokens - 1)
    assert engine.calls[0] == engine.calls[1] == "prefill"


def test_a_block_of_tokens_is_woken_by_one_that_is_not_counted(engine: SlowEngine) -> None:
    meter = Latency(new_tokens=19)
    times = request(meter, meter.session(opened(engine), 2, Group()))
    assert times["ttft_ms"] == pytest.approx([50])
    assert times["gaps_ms"] == pytest.approx([2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18])


def test_passes_are_timed_but_for_the_first_of_a_block(engine: SlowEngine) -> None:
    meter = Latency()
    assert meter.blocks_per_round(generates=False) == 1
    times = meter.session(opened(engine, "module"), 5, Group()).block()
    assert times == {"pass_ms": pytest.approx([7.0] * 8)}
    assert engine.calls == ["pass of 5"] * 9


class Pair(Group):
    """The second of two ranks, beside a first one that needs twice the time."""

    def wait(self) -> None:
        return

    def _gather(self, values: list[Any]) -> list[list[Any]]:
        return [values, [2 * time for time in values]]


def test_ranks_share_the_batch_and_the_slowest_counts(engine: SlowEngine) -> None:
    times = Latency().session(opened(engine, "module"), 5, Pair(1, 2)).block()
    assert times == {"pass_ms": pytest.approx([14.0] * 8)}
    assert set(engine.calls) == {"pass of 2"}


def test_a_rank_without_work_waits_and_measures_nothing(engine: SlowEngine) -> None:
    meter = Latency(new_tokens=4)

    class Idle(Pair):
        def _gather(self, values: list[Any]) -> list[list[Any]]:
            assert values == []
            return [[5.0, 6.0], []]

    assert meter.session(opened(engine), 1, Idle(1, 2)).block() == {"ttft_ms": [5.0, 6.0]}
    assert meter.session(opened(engine, "module"), 1, Idle(1, 2)).block() == {"pass_ms": [5.0, 6.0]}
    assert engine.calls == []


COLUMNS = {"ttft_ms": np.array([[40.0], [60.0], [50.0]]), "gaps_ms": np.array([[2.0, 4.0], [2.0, 4.0], [6.0, 12.0]])}


def values(size: int = 1, **settings: Any) -> dict[str, float]:
    metrics = Latency(**settings).metrics(size, generates=True)
    return {metric.name: float(metric.estimate({name: column[None] for name, column in COLUMNS.items()})[0]) for metric in metrics}


def test_metrics_follow_their_definitions() -> None:
    found = values(new_tokens=3)
    assert found["ttft_ms"] == 50
    assert found["tpot_ms"] == 3  # the median of the block means 3, 3 and 9
    assert found["itl_p50_ms"] == 4
    assert found["itl_p99_ms"] == pytest.approx(np.percentile([2, 4, 2, 4, 6, 12], 99))
    rates = [3 / (40 + 2 * 3), 3 / (60 + 2 * 3), 3 / (50 + 2 * 9)]
    assert found["tokens_per_second"] == pytest.approx(1e3 * np.median(rates))


def test_a_batch_multiplies_the_tokens_and_stands_in_the_names() -> None:
    one, eight = values(new_tokens=3), values(8, new_tokens=3)
    assert eight.keys() == {f"{name}@8" for name in one}
    assert eight["tokens_per_second@8"] == pytest.approx(8 * one["tokens_per_second"])
    assert eight["tpot_ms@8"] == one["tpot_ms"]


def test_estimates_take_draws_and_samples_keep_the_order() -> None:
    for metric in Latency(new_tokens=3).metrics(1, generates=True):
        drawn = {name: np.stack([column, column[::-1], column]) for name, column in COLUMNS.items()}
        assert metric.estimate(drawn).shape == (3,)
        assert np.allclose(metric.estimate(drawn), metric.estimate(drawn)[0])
        assert metric.each(COLUMNS).shape == (3,)
    ttft = Latency().metrics(1, generates=True)[0]
    assert ttft.each(COLUMNS).tolist() == [40, 60, 50]


def test_tpot_is_the_mean_of_a_block_so_that_single_pauses_do_not_set_it() -> None:
    gaps = np.full((4, 16), 2.0)
    gaps[0, 3] = 100.0
    tpot = Latency(new_tokens=19).judged(1, generates=True)
    assert tpot.name == "tpot_ms"
    assert tpot.each({"gaps_ms": gaps}).tolist() == [2 + 98 / 8, *[2.0] * 7]
    assert tpot.estimate({"gaps_ms": gaps[None]}).tolist() == [2.0]


def test_subjects_that_do_not_generate_have_latency_and_items() -> None:
    columns = {"pass_ms": np.array([[10.0, 20.0, 30.0]])}
    metrics = {metric.name: metric for metric in Latency().metrics(4, generates=False)}
    assert metrics.keys() == {"latency_ms@4", "items_per_second@4"}
    assert metrics["latency_ms@4"].estimate({"pass_ms": columns["pass_ms"][None]}).tolist() == [20]
    assert metrics["items_per_second@4"].estimate({"pass_ms": columns["pass_ms"][None]}).tolist() == [200]
    assert Latency().judged(4, generates=False).name == "latency_ms@4"


@pytest.mark.parametrize(
    "settings", [{"new_tokens": 1}, {"prompt_tokens": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"precision": 0.0}, {"seconds": 0.0}]
)
def test_settings_that_measure_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Latency(**settings)


def test_every_meter_is_registered_frozen_and_described() -> None:
    assert list(METERS) == ["latency", "memory", "quality", "assistant", "documents"]
    for name in METERS:
        meter = METERS[name]()
        assert (type(meter).__doc__ or "").strip()
        assert all(field.description for field in type(meter).model_fields.values())
    with pytest.raises(ValidationError):
        METERS["latency"]().seconds = 3  # type: ignore[attr-defined]


def test_requests_that_share_a_beginning_go_on_differently_and_the_others_are_never_taken_from_memory(subject: Any) -> None:
    class Seen:
        def __init__(self) -> None:
            self.prompts: list[torch.Tensor] = []
            self.forgotten = 0

        def first(self, ids: torch.Tensor) -> torch.Tensor:
            self.prompts.append(ids)
            return ids[:, 0]

        def forget(self) -> None:
            self.forgotten += 1

    class Prompts:
        def prompts(self, subject: Any, count: int, length: int) -> torch.Tensor:
            return torch.arange(count * length).view(count, length)

    for shared, own in ((3, 4), (0, 1)):
        engine = Seen()
        session = Latency(prompt_tokens=5, shared_tokens=shared, new_tokens=2).session(Opened(subject(), engine, Prompts()), 1, Group())
        for _ in range(2):
            session.block()
            session._left = 0
        texts = {tuple(ids[0].tolist()) for ids in engine.prompts}
        assert len(engine.prompts) == 4 and len(texts) == (3 if shared else own)
        assert len({text[:3] for text in texts}) == 1 and engine.forgotten == (0 if shared else 2)


def test_a_mix_is_timed_request_by_request_and_told_as_a_whole(engine: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "time", latency.time)
    mix: Any = ({"sequences": 2, "prompt_tokens": 4, "new_tokens": 3}, {"prompt_tokens": 8, "new_tokens": 2})
    meter = Latency(mix=mix)
    session = meter.session(opened(engine), 1, Group())
    rounds = [[session.block()["requests_ms"][0] for _ in range(meter.blocks_per_round(True))] for _ in range(2)]
    assert rounds == [[pytest.approx(50 + 1 + 2), pytest.approx(50 + 1)]] * 2
    columns = {"requests_ms": np.array(rounds)[None]}
    assert [(metric.name, metric.estimate(columns).tolist()) for metric in meter.metrics(1, True)] == [
        ("mix_ms", [pytest.approx(104)]),
        ("mix_tokens_per_second", [pytest.approx(8 / 0.104)]),
    ]
    assert meter.judged(1, True).name == "mix_ms" and meter.positions == 10


def test_a_mix_has_its_own_sizes() -> None:
    with pytest.raises(OptkitError, match="leave out batch_sizes and shared_tokens"):
        Latency(mix=({"prompt_tokens": 4, "new_tokens": 2},), batch_sizes=(1, 8))
