"""Requests as users send them: lengths and moments of arrival from a seed, one server that takes them as they come.

Arrival is open-loop: a request comes when it comes, however far behind the server is, so that a slow one cannot hide its queue. First-token
times count from arrival (Kwon et al. 2023, arXiv 2309.06180, measure serving so).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from optkit.measure.contract import Opened


@dataclass(frozen=True)
class Request:
    """One prompt (1, p), and how many tokens follow."""

    prompt: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Served:
    """What became of a request: ms from its arrival to the first token, gaps between later ones, and ms from arrival to the end."""

    ttft_ms: float
    gaps_ms: tuple[float, ...]
    end_ms: float
    waiting: int  # requests that had arrived and not begun when it began, itself included


def requests_of(
    arm: Opened, count: int, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int], shared_tokens: int, seed: int
) -> list[Request]:
    """Return requests with lengths drawn evenly between the ends, the same for every arm."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(prompt_tokens[0], prompt_tokens[1] + 1, count)
    tokens = draw.integers(new_tokens[0], new_tokens[1] + 1, count)
    prompts = arm.task.prompts(arm.subject, count, prompt_tokens[1])
    prompts[:, :shared_tokens] = prompts[0, :shared_tokens].clone()
    return [Request(prompt[None, :length], int(new)) for prompt, length, new in zip(prompts, lengths, tokens, strict=True)]


def serve(
    engine: Any, requests: Sequence[Request], arrivals_s: Sequence[float], clock: Callable[[], float] = time.perf_counter
) -> list[Served]:
    """Serve requests one after another, none before it has arrived.

    Args:
        engine: what executes them.
        requests: in the order of their arrival.
        arrivals_s: seconds after the start at which each arrives.
        clock: seconds from some moment on.
    """
    start, found = clock(), []
    for number, (request, arrival) in enumerate(zip(requests, arrivals_s, strict=True)):
        while clock() - start < arrival:
            time.sleep(min(0.001, max(0.0, arrival - (clock() - start))))
        begun = clock() - start
        waiting = sum(1 for other in arrivals_s[number:] if other <= begun)
        token = engine.first(request.prompt)
        token[0].item()
        marks = [clock() - start]
        for later in engine.further(token, request.new_tokens - 1):
            later[0].item()
            marks.append(clock() - start)
        gaps = tuple(1e3 * (b - a) for a, b in pairwise(marks))
        found.append(Served(1e3 * (marks[0] - arrival), gaps, 1e3 * (marks[-1] - arrival), waiting))
    engine.reset()
    return found


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Return moments at which requests arrive at random, so many a second on average: a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1.0, count)
    moments: list[float] = (np.cumsum(gaps) / rate).tolist()
    return moments


def percentiles(served: Sequence[Served]) -> Mapping[str, float]:
    """Return the 90th percentile of first tokens and the 99th of gaps, in ms, and the longest queue."""
    gaps = [gap for one in served for gap in one.gaps_ms]
    return {
        "ttft_p90_ms": float(np.percentile([one.ttft_ms for one in served], 90)),
        "gap_p99_ms": float(np.percentile(gaps, 99)) if gaps else 0.0,
        "longest_queue": float(max(one.waiting for one in served)),
    }


def warm(engine: Any, request: Request) -> None:
    """Serve one request that is not counted."""
    token = engine.first(request.prompt)
    for later in engine.further(token, request.new_tokens - 1):
        later[0].item()
    if hasattr(engine, "forget"):
        engine.forget()
