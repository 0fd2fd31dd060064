"""Several ways to serve one model, and for each request the one that is quickest on this machine by a table measured when it is opened."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_REPEATS, _STEPS = 3, 4


@dataclass(frozen=True)
class Way:
    """An engine, the threads that it computes with (None: all), and the perplexity of what it says, as a ratio to the untouched model."""

    engine: Any
    threads: int | None = None
    perplexity: float = 1.0


@dataclass(frozen=True)
class Times:
    """Seconds of a prompt, and of a later token."""

    first_s: float
    later_s: float

    def request_s(self, new_tokens: int) -> float:
        """Return the seconds of a whole request."""
        return self.first_s + (new_tokens - 1) * self.later_s


class AdaptiveEngine:
    """Chooses a way for each request by its sequences and the length of its prompt. It is judged by the least of its ways."""

    def __init__(self, ways: Mapping[str, Way], vocabulary: int, batches: Sequence[int], prompts: Sequence[int], new_tokens: int) -> None:
        """Take the ways by name, and measure them.

        Args:
            ways: at least one.
            vocabulary: token ids that the model knows.
            batches: sequences at once that are measured.
            prompts: lengths of prompts that are measured.
            new_tokens: that a request is expected to ask for.
        """
        self.ways = ways
        self._new_tokens = new_tokens
        sizes = [(batch, prompt) for batch in batches for prompt in prompts]
        self.table = {size: {name: _measured(way, vocabulary, *size) for name, way in ways.items()} for size in sizes}
        self.chosen = {name: 0 for name in ways}  # how many requests each way has had
        self._now = next(iter(ways.values()))

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, choose a way, fill its cache and return the (b, v) logits of the last position."""
        self._choose(input_ids)
        with _threads(self._now.threads):
            logits: Tensor = self._now.engine.prefill(input_ids)
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        with _threads(self._now.threads):
            logits: Tensor = self._now.engine.step(token_ids)
        return logits

    def first(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, choose a way, fill its cache and return the (b,) most likely next tokens."""
        self._choose(input_ids)
        with _threads(self._now.threads):
            tokens: Tensor = self._now.engine.first(input_ids)
        return tokens

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times."""
        with _threads(self._now.threads):
            yield from self._now.engine.further(token_ids, count)

    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by the way of the highest perplexity."""
        logits: Tensor = max(self.ways.values(), key=lambda way: way.perplexity).engine.score(input_ids)
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values."""
        held: int = self._now.engine.cache_bytes()
        return held

    def reset(self) -> None:
        """Forget all caches."""
        for way in self.ways.values():
            way.engine.reset()

    def best(self, batch: int, prompt: int) -> str:
        """Return the name of the way that is quickest for requests like the nearest that was measured."""
        size = min(self.table, key=lambda size: abs(math.log(size[0] / batch)) + abs(math.log(size[1] / prompt)))
        times = self.table[size]
        return min(times, key=lambda name: times[name].request_s(self._new_tokens))

    def _choose(self, input_ids: Tensor) -> None:
        name = self.best(*input_ids.shape)
        self.chosen[name] += 1
        self._now.engine.reset()
        self._now = self.ways[name]


def _measured(way: Way, vocabulary: int, batch: int, prompt: int) -> Times:
    """Return the least times of a few requests: what else the machine did is left out."""
    ids = torch.arange(batch * prompt).mul(7919).remainder(vocabulary).view(batch, prompt)
    firsts, laters = [], []
    with _threads(way.threads):
        for _ in range(_REPEATS):
            start = time.perf_counter()
            token = way.engine.first(ids)
            token[0].item()
            middle = time.perf_counter()
            for later in way.engine.further(token, _STEPS):
                later[0].item()
            firsts.append(middle - start)
            laters.append((time.perf_counter() - middle) / _STEPS)
    way.engine.reset()
    return Times(min(firsts), min(laters))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
