"""Several ways to serve one model, and for each request the one that is quickest on this machine.

That is told by a table, which is measured when the first request comes: at opening, other models may be opened beside.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optkit.core.other_work import OtherWork

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


@dataclass(frozen=True)
class Choice:
    """Whose way a prompt takes, and whose its later tokens."""

    prompt: str
    later: str

    def __str__(self) -> str:
        return self.later if self.prompt == self.later else f"{self.later} after {self.prompt}"


class AdaptiveEngine:
    """Chooses for each request by its sequences and the length of its prompt: one way, or one for the prompt and one for what follows.

    Where ways differ in their threads, those are passed over that want more cores than others leave free: a thread that waits for
    its core keeps all of them waiting. It is judged by the least of its ways.
    """

    def __init__(
        self,
        ways: Mapping[str, Way],
        vocabulary: int,
        batches: Sequence[int],
        prompts: Sequence[int],
        new_tokens: int,
        others: Callable[[], float] | None = None,
    ) -> None:
        """Take the ways by name.

        Args:
            ways: at least one.
            vocabulary: token ids that the model knows.
            batches: sequences at once that are measured.
            prompts: lengths of prompts that are measured.
            new_tokens: that a request is expected to ask for.
            others: tells how many cores are kept busy by others; by default the system is asked.
        """
        self.ways = ways
        self._new_tokens = new_tokens
        self._choices = [Choice(one, other) for one in ways for other in ways if one == other or _hands_over(ways[one], ways[other])]
        self._sizes = [(batch, prompt) for batch in batches for prompt in prompts]
        self._vocabulary = vocabulary
        self.chosen = Counter[Choice]()  # how many requests each choice has had
        self._now = self._choices[0]
        self._cores = torch.get_num_threads()
        several = len({way.threads or self._cores for way in ways.values()}) > 1
        self._others = (others or OtherWork().cores) if several else None

    @cached_property
    def table(self) -> dict[tuple[int, int], dict[str, Times]]:
        """The times of each way by sequences and length of the prompt, measured once."""
        return {size: {name: _measured(way, self._vocabulary, *size) for name, way in self.ways.items()} for size in self._sizes}

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, choose, fill the cache and return the (b, v) logits of the last position."""
        self._later.engine.reset()
        self._now = self.best(*input_ids.shape)
        self.chosen[self._now] += 1
        first, later = self.ways[self._now.prompt], self._later
        with _threads(first.threads):
            logits: Tensor = later.engine.prefill(input_ids) if first is later else later.engine.prefill_by(first.engine, input_ids)
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        with _threads(self._later.threads):
            logits: Tensor = self._later.engine.step(token_ids)
        return logits

    def first(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, choose, fill the cache and return the (b,) most likely next tokens."""
        return self.prefill(input_ids).argmax(-1)

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times."""
        with _threads(self._later.threads):
            yield from self._later.engine.further(token_ids, count)

    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by the way of the highest perplexity."""
        logits: Tensor = max(self.ways.values(), key=lambda way: way.perplexity).engine.score(input_ids)
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values."""
        held: int = self._later.engine.cache_bytes()
        return held

    def reset(self) -> None:
        """Forget all caches."""
        for way in self.ways.values():
            way.engine.reset()

    def best(self, batch: int, prompt: int) -> Choice:
        """Return what is quickest now for requests like the nearest that was measured."""
        size = min(self.table, key=lambda size: abs(math.log(size[0] / batch)) + abs(math.log(size[1] / prompt)))
        times = self.table[size]
        return min(self._possible(), key=lambda choice: times[choice.prompt].first_s + (self._new_tokens - 1) * times[choice.later].later_s)

    def _possible(self) -> list[Choice]:
        """Return the choices whose threads find a core each, as far as others leave any; all where none does."""
        if self._others is None:
            return self._choices
        free = max(1, round(self._cores - self._others()))
        fitting = {name for name, way in self.ways.items() if (way.threads or self._cores) <= free}
        return [choice for choice in self._choices if {choice.prompt, choice.later} <= fitting] or self._choices

    @property
    def _later(self) -> Way:
        return self.ways[self._now.later]


def _hands_over(first: Way, later: Way) -> bool:
    """Say whether one way's keys and values of a prompt serve another."""
    is_like = getattr(later.engine, "is_like", None)
    return is_like is not None and is_like(first.engine)


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
