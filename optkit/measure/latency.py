"""First token, later tokens and throughput, in blocks of a few tokens. Only the model and the greedy choice are timed, no text handling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from optkit.core.errors import OptkitError
from optkit.core.group import Group
from optkit.core.measurement import Array, Metric, Samples
from optkit.measure.contract import Meter, Opened, Session
from optkit.measure.mixed import Load, MixedSession, mixed_metrics

Count = Annotated[int, Field(ge=1, le=1_000_000)]
BLOCK_TOKENS = 8
_OWN_PROMPTS = 64  # requests until a prompt comes again


class Latency(Meter):
    """Requests of ``prompt_tokens``, continued by ``new_tokens``, at each of ``batch_sizes``.

    TTFT is the time to the first token; TPOT is (end to end - TTFT) / (new_tokens - 1), ITL each gap between tokens: the definitions
    of https://docs.nvidia.com/nim/benchmarking. A subject with an encoder reads items of its task instead of prompts, and that is part
    of the TTFT. For a subject that does not generate, the time of a forward pass.
    """

    timed: ClassVar[bool] = True
    prompt_tokens: Count = Field(default=128, description="tokens of each prompt")
    shared_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="first tokens that all prompts share; every request then has a prompt of its own, else all have the same"
    )
    new_tokens: Annotated[int, Field(ge=2, le=1_000_000)] = Field(default=64, description="tokens generated for each prompt")
    mix: tuple[Load, ...] = Field(
        default=(), max_length=64, description="requests of other sizes, one after another, whose time together is measured instead"
    )
    batch_sizes: tuple[Count, ...] = Field(default=(1,), min_length=1, description="sequences at once; each size is measured")
    precision: float = Field(default=0.02, gt=0, lt=1, description="stop when the per-token ratio is known within this share")
    seconds: float = Field(default=60, gt=0, description="stop after this long, for each batch size, whatever the precision")

    def session(self, arm: Opened, batch_size: int, group: Group) -> Session:
        """Return a measurement in progress at one batch size; every rank of the group opens one."""
        rows = group.rows(batch_size)
        if self.mix:
            return MixedSession(arm, self.mix, group)
        if arm.subject.kind == "causal-lm":
            prompts = arm.task.prompts(arm.subject, batch_size * (_OWN_PROMPTS if self.shared_tokens else 1), self.prompt_tokens)
            prompts[:, : self.shared_tokens] = prompts[0, : self.shared_tokens].clone()
            return _Generation(arm, [request[rows] for request in prompts.split(batch_size)], rows, self.new_tokens, group)
        if arm.subject.kind == "seq2seq-lm":
            request = {name: tensor[rows] for name, tensor in arm.task.batch(arm.subject, batch_size).items()}
            return _Generation(arm, [request], rows, self.new_tokens, group)
        return _Forward(arm, batch_size, group)

    def blocks_per_round(self, generates: bool) -> int:
        """Return how many blocks make one request, or one round of forward passes."""
        if self.mix:
            return len(self.mix)
        return 1 + -(-(self.new_tokens - 1) // (BLOCK_TOKENS + 1)) if generates else 1

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        if self.mix and (self.batch_sizes != (1,) or self.shared_tokens):
            raise OptkitError(
                "mix says how many sequences its requests have, and none of them share tokens; leave out batch_sizes and shared_tokens"
            )
        return self

    @property
    def positions(self) -> int:
        """The positions of the longest request, prompt and new tokens together."""
        return max((load.prompt_tokens + load.new_tokens for load in self.mix), default=self.prompt_tokens + self.new_tokens)

    def judged(self, batch_size: int, generates: bool) -> Metric:
        """Return the metric whose precision decides how long is measured: the time of a later token, or of a pass."""
        wanted = "mix_ms" if self.mix else "tpot_ms" if generates else "latency_ms"
        return next(metric for metric in self.metrics(batch_size, generates) if metric.name.startswith(wanted))

    def metrics(self, batch_size: int, generates: bool) -> tuple[Metric, ...]:
        """Return what is made of the times at one batch size; sizes other than 1 are part of the names."""
        if self.mix:
            return mixed_metrics(self.mix)
        made = _generation_metrics(batch_size, self.new_tokens) if generates else _forward_metrics(batch_size)
        return tuple(_renamed(metric, sized(metric.name, batch_size)) for metric in made)


def sized(metric: str, batch_size: int) -> str:
    """Return a metric's name at a batch size: ``tpot_ms`` at 1 and ``tpot_ms@8`` at 8."""
    return metric if batch_size == 1 else f"{metric}@{batch_size}"


class _Generation:
    """One request after another; a block is a prefill, or the next few tokens."""

    def __init__(self, arm: Opened, requests: Sequence[Tensor | Mapping[str, Tensor]], rows: slice, new_tokens: int, group: Group) -> None:
        self._engine = arm.engine
        self._requests, self._empty = requests, rows.start == rows.stop
        self._number = 0
        self._new_tokens = new_tokens
        self._group = group
        self._left = 0
        self._tokens = torch.empty(0)

    def block(self) -> Mapping[str, list[float]]:
        if self._left == 0:
            self._left = self._new_tokens - 1
            return {"ttft_ms": self._timed(self._first)}
        count = min(BLOCK_TOKENS + 1, self._left)
        self._left -= count
        return {"gaps_ms": self._timed(partial(self._further, count))}

    def _timed(self, work: Callable[[], list[float]]) -> list[float]:
        self._group.wait()
        return self._group.slowest([1e3 * (after - before) for before, after in pairwise([] if self._empty else work())])

    def _first(self) -> list[float]:
        """Take a request and then the next, and return when the second began and ended.

        Where all requests are one and the same, an engine that keeps beginnings of prompts forgets them before: else it would have all.
        """
        before, now = (self._requests[(self._number + step) % len(self._requests)] for step in (0, 1))
        self._number += 1
        self._take(self._engine.first(before))
        if len(self._requests) == 1 and hasattr(self._engine, "forget"):
            self._engine.forget()
        return [time.perf_counter(), self._take(self._engine.first(now))]

    def _further(self, count: int) -> list[float]:
        """Return when each of so many tokens was there.

        The first token after a stop pays for cold caches and sleeping threads, which a request served alone would not: its time is not
        known by this, unless there is no other.
        """
        marks = [time.perf_counter()] if self._new_tokens == 2 else []
        return [*marks, *(self._take(tokens) for tokens in self._engine.further(self._tokens, count))]

    def _take(self, tokens: Tensor) -> float:
        self._tokens = tokens
        self._tokens[0].item()  # on an accelerator, the wait for the token that a user would see
        return time.perf_counter()


class _Forward:
    """Forward passes over one batch; a block is a few of them."""

    def __init__(self, arm: Opened, batch_size: int, group: Group) -> None:
        rows = group.rows(batch_size)
        self._batch = {name: tensor[rows] for name, tensor in arm.task.batch(arm.subject, batch_size).items()}
        self._empty = rows.start == rows.stop
        self._engine = arm.engine
        self._group = group

    def block(self) -> Mapping[str, list[float]]:
        self._group.wait()
        times = []
        for _ in range(0 if self._empty else BLOCK_TOKENS + 1):
            start = time.perf_counter()
            self._engine.forward(self._batch)
            times.append(1e3 * (time.perf_counter() - start))
        return {"pass_ms": self._group.slowest(times[1:])}  # the first pays for having been stopped


def _generation_metrics(batch_size: int, new_tokens: int) -> tuple[Metric, ...]:
    def percentile(share: float) -> Callable[[Samples], Array]:
        return lambda columns: np.percentile(_flat(columns["gaps_ms"]), share, axis=-1)

    def rates(columns: Samples) -> Array:
        requests_ms = columns["ttft_ms"][..., 0] + (new_tokens - 1) * columns["gaps_ms"].mean(-1)
        return np.asarray(batch_size * new_tokens / requests_ms * 1e3)

    return (
        Metric("ttft_ms", "ms", False, lambda c: np.median(_flat(c["ttft_ms"]), axis=-1), lambda c: c["ttft_ms"].ravel()),
        Metric(
            "tpot_ms",
            "ms",
            False,
            lambda c: np.median(_flat(_block_means(c["gaps_ms"])), axis=-1),
            lambda c: _block_means(c["gaps_ms"]).ravel(),
        ),
        *(Metric(f"itl_p{share}_ms", "ms", False, percentile(share), lambda c: c["gaps_ms"].mean(-1)) for share in (50, 90, 99)),
        Metric("tokens_per_second", "tokens/s", True, lambda c: np.median(rates(c), axis=-1), rates),
    )


def _forward_metrics(batch_size: int) -> tuple[Metric, ...]:
    return (
        Metric("latency_ms", "ms", False, lambda c: np.median(_flat(c["pass_ms"]), axis=-1), lambda c: c["pass_ms"].mean(-1)),
        Metric(
            "items_per_second",
            "items/s",
            True,
            lambda c: batch_size / np.median(_flat(c["pass_ms"]), axis=-1) * 1e3,
            lambda c: batch_size / c["pass_ms"].mean(-1) * 1e3,
        ),
    )


def _block_means(gaps_ms: Array) -> Array:
    """Return (..., rounds, blocks) means of the (..., rounds, gaps) times of single tokens."""
    parts = np.array_split(gaps_ms, range(BLOCK_TOKENS, gaps_ms.shape[-1], BLOCK_TOKENS), axis=-1)
    return np.stack([part.mean(-1) for part in parts], axis=-1)


def _flat(values: Array) -> Array:
    """Return (draws, everything else)."""
    return values.reshape(len(values), -1)


def _renamed(metric: Metric, name: str) -> Metric:
    return Metric(name, metric.unit, metric.higher_is_better, metric.estimate, metric.each, metric.relative)
