"""The stages of a request: how long each takes, what it must compute and read, and how near that is to what the machine can do.

A phase is timed untouched and watched, in turn. Watching by Python costs about a microsecond an entry into a module; these are measured and
taken off again, and what remains of the difference is told. The native step counts its stages itself, for next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

from optkit.engines import CompiledEngine, CompiledForward, NativeEngine
from optkit.kernels.decoder import STAGES as NATIVE_STAGES
from optkit.measure.clock import FRAMEWORK, StageClock, event_cost_s
from optkit.measure.contract import Opened
from optkit.measure.counters import Counters, energy_joules, ticks_per_second
from optkit.measure.traffic import read_bandwidth, weight_bytes_per_token
from optkit.measure.work import Forward, Work, work_of

SAMPLING, GRAPH, _WAITING = "sampling", "compiled graph", "communication"
_MOST_SWEPT_BYTES = 2**30
_STEPS_IN_A_ROW = 4
_MATRIX = 1536  # of the products that tell the peak


@dataclass(frozen=True)
class StageTime:
    """One stage of one phase, for all its blocks together and for each. ``cycles`` are ticks of the clock, None where it cannot be read."""

    ms: float
    flops: float
    bytes: float
    cycles: float | None
    blocks_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A prompt's forward, a later token, or a forward pass. ``sum_ms`` is that of the stages, ``total_ms`` the untouched time."""

    total_ms: float
    sum_ms: float
    watched_ms: float
    stages: Mapping[str, StageTime]


@dataclass(frozen=True)
class Profile:
    """All phases of one arm, and what the machine can do, measured in the same process."""

    phases: Mapping[str, Phase]
    ticks_per_second: float | None
    read_bytes_per_second: float
    peak_flops: Mapping[str, float]
    counted: Mapping[str, float]  # over one whole request: of this thread and those that it starts; joules are those of the whole processor
    unavailable: Mapping[str, str]


def profile(arm: Opened, prompt_tokens: int, new_tokens: int, batch_size: int, rounds: int) -> Profile:
    """Return where the time of requests goes.

    Args:
        arm: what is measured; its engine is in use by nobody else.
        prompt_tokens: of each prompt, for causal models.
        new_tokens: later tokens that are timed in each round.
        batch_size: sequences, or items, at once.
        rounds: how often each phase is timed untouched, and as often watched.
    """
    watch = _Watch(arm)
    if arm.subject.kind == "module":
        batch = arm.task.batch(arm.subject, batch_size)
        length = max((tensor.shape[1] for tensor in batch.values() if tensor.ndim > 1), default=1)
        arm.engine.forward(batch)
        pairs = [watch.run(lambda: arm.engine.forward(batch)) for _ in range(rounds)]
        whole: Callable[[], Any] = partial(arm.engine.forward, batch)
        work = work_of(arm.subject.module, Forward(batch_size, length, only_last=False))
        phases = {"forward": watch.phase(pairs, work)}
    else:
        phases = _generation(arm, watch, prompt_tokens, new_tokens, batch_size, rounds)
        prompts = _request(arm, prompt_tokens, batch_size)
        whole = partial(_write, arm.engine, prompts, new_tokens)
    counted, unavailable = _counted(whole)
    unavailable |= {} if watch.ticks_per_second else {"cycles": "the time-stamp counter is read by optkit's kernels, and they are not here"}
    swept = min(weight_bytes_per_token(arm.subject.module), _MOST_SWEPT_BYTES)
    return Profile(phases, watch.ticks_per_second, read_bandwidth(swept), _peaks(), counted, unavailable)


@dataclass(frozen=True)
class _Pair:
    """One piece of work, untouched and watched."""

    plain_s: float
    watched_s: float
    seconds: Mapping[tuple[str, int | None], float]
    events: Mapping[str, float]


class _Watch:
    """Watches an arm's module, and its native steps where it has some."""

    def __init__(self, arm: Opened) -> None:
        self._engine = arm.engine
        self._alone = arm.subject.mesh.parts == 1
        self.module = arm.subject.module
        self.ticks_per_second = ticks_per_second()
        self._event_cost_s = event_cost_s()

    def run(self, work: Callable[[], Any], sampled: bool = False, warm: bool = True, times: int = 1) -> _Pair:
        """Do a piece of work untouched, then watched.

        Args:
            work: what is done.
            sampled: the choice of the token is part of it.
            warm: do it before each, as often, as what follows a stop pays for cold caches and sleeping threads.
            times: how often in a row.
        """
        if warm:
            self._time(work, sampled, times)
        plain = self._time(work, sampled, times)[0]
        ticks = torch.zeros(len(NATIVE_STAGES), dtype=torch.int64)
        if isinstance(self._engine, NativeEngine):
            self._engine.watch(ticks)
        clock = StageClock(self.module)
        with clock.running():
            if warm:
                self._time(work, sampled, times)
                ticks.zero_()
            clock.begin()
            watched, sampling = self._time(work, sampled, times)
        if isinstance(self._engine, NativeEngine):
            self._engine.watch(None)
        seconds = dict(clock.seconds)
        counted = {(stage, None): count / (self.ticks_per_second or 1) for stage, count in zip(NATIVE_STAGES, ticks.tolist(), strict=True)}
        for key, spent in counted.items():
            if spent and not (self._alone and key[0] == _WAITING):
                seconds[key] = seconds.get(key, 0.0) + spent
        known = sum(counted.values()) + sampling
        seconds[FRAMEWORK, None] = max(0.0, seconds.get((FRAMEWORK, None), 0.0) - known)
        if sampling:
            seconds[SAMPLING, None] = sampling
        each = {key: value / times for key, value in seconds.items()}
        return _Pair(plain / times, watched / times, each, {name: count / times for name, count in clock.events.items()})

    def _time(self, work: Callable[[], Any], sampled: bool, times: int) -> tuple[float, float]:
        choosing = 0.0
        start = time.perf_counter()
        for _ in range(times):
            found = work()
            if sampled:
                before = time.perf_counter()
                found.argmax(-1)
                choosing += time.perf_counter() - before
        return time.perf_counter() - start, choosing

    def phase(self, pairs: list[_Pair], work: Mapping[str, Work]) -> Phase:
        """Return the phase that these pairs are of, from the quicker half of them: what else the machine did is left out."""
        quickest = sorted(pairs, key=lambda pair: pair.watched_s)[: -(-len(pairs) // 2)]
        plain_s = sorted(pair.plain_s for pair in pairs)[: len(quickest)]
        compiled = isinstance(self._engine, CompiledEngine | CompiledForward)
        keys = dict.fromkeys(key for pair in pairs for key in pair.seconds)
        spent = {}
        for key in keys:
            costs = [pair.events.get(key[0], 0) * self._event_cost_s * _share(pair, key) for pair in quickest]
            spent[key] = max(0.0, mean(pair.seconds.get(key, 0.0) for pair in quickest) - mean(costs))
        stages: dict[str, StageTime] = {}
        for stage in dict.fromkeys(key[0] for key in keys):
            blocks = sorted((block, value) for (name, block), value in spent.items() if name == stage and block is not None)
            seconds = sum(value for (name, _), value in spent.items() if name == stage)
            done = work.get(stage, Work())
            name = GRAPH if compiled and stage == FRAMEWORK else stage
            cycles = None if self.ticks_per_second is None else seconds * self.ticks_per_second
            stages[name] = StageTime(seconds * 1e3, done.flops, done.bytes, cycles, tuple(value * 1e3 for _, value in blocks))
        total, watched = mean(plain_s) * 1e3, mean(pair.watched_s for pair in quickest) * 1e3
        order = sorted(stages.items(), key=lambda item: (item[0] in (FRAMEWORK, GRAPH), -item[1].ms))
        return Phase(total, sum(stage.ms for stage in stages.values()), watched, dict(order))


def _share(pair: _Pair, key: tuple[str, int | None]) -> float:
    """Return the share of a stage's entries and exits that belongs to one block of it: all blocks are entered equally often."""
    return 1 / sum(1 for stage, _ in pair.seconds if stage == key[0])


def _generation(arm: Opened, watch: _Watch, prompt_tokens: int, new_tokens: int, batch_size: int, rounds: int) -> dict[str, Phase]:
    engine, module = arm.engine, arm.subject.module
    request = _request(arm, prompt_tokens, batch_size)
    length = prompt_tokens if arm.subject.kind == "causal-lm" else request["input_ids"].shape[1]
    tokens = engine.first(request)
    for _ in engine.further(tokens, 2):
        pass
    first: list[_Pair] = []
    later: list[_Pair] = []
    for _ in range(rounds):
        first.append(watch.run(lambda: engine.prefill(request), sampled=True, warm=False))
        step = partial(engine.step, engine.first(request))
        later += [watch.run(step, sampled=True, times=_STEPS_IN_A_ROW) for _ in range(max(1, new_tokens // (4 * _STEPS_IN_A_ROW)))]
    engine.reset()
    past = length + new_tokens // 2 + 1  # half of the positions that the steps see
    return {
        "prefill": watch.phase(first, work_of(module, Forward(batch_size, length))),
        "decode": watch.phase(later, work_of(module, Forward(batch_size, 1, past))),
    }


def _request(arm: Opened, prompt_tokens: int, batch_size: int) -> Any:
    causal = arm.subject.kind == "causal-lm"
    return arm.task.prompts(arm.subject, batch_size, prompt_tokens) if causal else arm.task.batch(arm.subject, batch_size)


def _write(engine: Any, request: Any, new_tokens: int) -> None:
    for _ in engine.further(engine.first(request), new_tokens - 1):
        pass
    engine.reset()


def _counted(work: Callable[[], Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return what the processor counts while the work is done once, and of what it does not tell, why."""
    counters = Counters()
    before, why = energy_joules()
    with counters.counting():
        work()
    after, _ = energy_joules()
    counters.close()
    found: dict[str, float] = {name: float(value) for name, value in counters.values.items()}
    if before is not None and after is not None:
        found["joules"] = after - before
    unavailable = {"core cycles, instructions, cache misses": counters.unavailable} if counters.unavailable else {}
    return found, unavailable | ({"energy": why} if why else {})


@torch.inference_mode()
def _peaks() -> dict[str, float]:
    """Return operations per second of large products, in the types that weights have."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
        nn.functional.linear(a, b)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        found[str(dtype).removeprefix("torch.")] = 2 * _MATRIX**3 / min(times)
    return found
