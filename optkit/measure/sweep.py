"""Times of first and later tokens of one model over a grid of prompt lengths and batch sizes, with what each forward had to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from optkit.measure.clock import FEED_FORWARD, HEAD, PROJECTIONS, RECURRENT, SCORES
from optkit.measure.law import Load, Point
from optkit.measure.traffic import parameters_of
from optkit.measure.work import Forward, Work, work_of

PREFILL, DECODE = "prefill", "decode"
_LEAST_STEPS, _MOST_STEPS = 6, 48
_REPEATS_S = 0.4  # a forward is repeated for so long, at least three times


@dataclass(frozen=True)
class Swept:
    """The measured points, and the (prompt, batch) that would have taken too long."""

    points: list[Point]
    skipped: list[tuple[int, int]]


def sweep(
    name: str,
    module: nn.Module,
    engine: Any,
    prompts: Iterable[int],
    batches: Iterable[int],
    most_s: float,
    tell: Callable[[str], None] = lambda text: None,
    steps_in_one_call: bool = False,
) -> Swept:
    """Measure a causal model; what takes longer than ``most_s`` by its operations, at the rate seen so far, is left out.

    ``steps_in_one_call`` says that the engine calls no module in its steps.
    """
    vocabulary = int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    parameters = parameters_of(module)
    points: list[Point] = []
    skipped: list[tuple[int, int]] = []
    rate = 0.0
    for prompt, batch in sorted(((p, b) for p in prompts for b in batches), key=lambda pair: pair[0] * pair[1]):
        load = load_of(module, Forward(batch, prompt))
        operations = load.linear_flops + load.head_flops + load.score_flops
        if rate and operations / rate > most_s:
            skipped.append((prompt, batch))
            continue
        tell(f"{name}: prompt {prompt}, batch {batch}")
        ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
        first = _timed(lambda ids=ids: engine.first(ids))  # type: ignore[misc]
        rate = max(rate, operations / first)
        points.append(Point(name, parameters, prompt, batch, PREFILL, load, first))
        tokens = engine.first(ids)
        tokens = engine.step(tokens).argmax(-1)
        times: list[float] = []
        while len(times) < _LEAST_STEPS or (sum(times) < _REPEATS_S and len(times) < _MOST_STEPS):
            start = time.perf_counter()
            tokens = engine.step(tokens).argmax(-1)
            times.append(time.perf_counter() - start)
        past = Forward(batch, 1, prompt + len(times) // 2 + 1)
        points.append(Point(name, parameters, prompt, batch, DECODE, load_of(module, past, steps_in_one_call), median(times)))
        engine.reset()
    return Swept(points, skipped)


def load_of(module: nn.Module, forward: Forward, in_one_call: bool = False) -> Load:
    """Return what a forward must do, as the law asks for it; ``in_one_call`` where kernels do all of it and no module is called."""
    work = work_of(module, forward)
    inner = [work.get(stage, Work()) for stage in (PROJECTIONS, FEED_FORWARD, RECURRENT)]
    head, scores = work.get(HEAD, Work()), work.get(SCORES, Work())
    return Load(
        calls=0 if in_one_call else sum(part.calls for part in work.values()),
        rows=forward.batch * forward.tokens,
        linear_flops=sum(part.flops for part in inner),
        linear_bytes=sum(part.bytes for part in inner),
        head_rows=forward.batch if forward.only_last else forward.batch * forward.tokens,
        head_flops=head.flops,
        head_bytes=head.bytes,
        score_flops=scores.flops,
        cache_bytes=scores.bytes,
    )


def _timed(work: Callable[[], Any]) -> float:
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _REPEATS_S and len(times) < 20):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
