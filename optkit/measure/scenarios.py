"""Workloads instead of single numbers: an assistant that answers requests as they come, and a batch of documents to be written."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from optkit.measure.contract import Meter, Opened
from optkit.measure.requests import arrivals, percentiles, requests_of, serve, warm

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Range = tuple[Count, Count]
_HALVINGS = 5  # of the stretch in which the highest rate lies
_OVERLOAD = 2.0


class Scenario(Meter):
    """A meter that serves a workload of its own, each arm by itself, one after another."""

    @abstractmethod
    def serve(self, arm: Opened) -> dict[str, float]:
        """Serve the workload, and return its numbers by metric."""

    @abstractmethod
    def units(self) -> Mapping[str, tuple[str, bool]]:
        """Return for each metric its unit, and whether more is better."""


class Assistant(Scenario):
    """The highest rate of requests at which limits on first tokens and gaps hold; and what twice that rate does.

    Requests have random lengths and arrive at random (a Poisson process), open-loop; one server takes them in order. The rate is found by
    halving between none and what the server does without a pause, each time in real time.
    """

    requests: Annotated[int, Field(ge=8, le=100_000)] = Field(default=24, description="requests that each rate is tried with")
    prompt_tokens: Range = Field(default=(16, 128), description="shortest and longest prompt")
    new_tokens: Range = Field(default=(8, 48), description="fewest and most tokens of an answer")
    shared_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = Field(default=0, description="first tokens that all prompts share")
    ttft_p90_ms: Annotated[float, Field(gt=0)] = Field(default=500.0, description="limit: first token after arrival, 90th percentile")
    gap_p99_ms: Annotated[float, Field(gt=0)] = Field(default=100.0, description="limit: gap between tokens, 99th percentile")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="draws lengths and arrivals")

    def serve(self, arm: Opened) -> dict[str, float]:
        """Find the rate."""
        found = requests_of(arm, self.requests, self.prompt_tokens, self.new_tokens, self.shared_tokens, self.seed)
        engine = arm.engine
        warm(engine, found[0])
        start = time.perf_counter()
        alone = percentiles(serve(engine, found, [0.0] * len(found)))
        capacity = len(found) / (time.perf_counter() - start)

        def at(rate: float) -> Mapping[str, float]:
            if hasattr(engine, "forget"):
                engine.forget()
            return percentiles(serve(engine, found, arrivals(len(found), rate, self.seed)))

        low, high, best = 0.0, capacity, None
        for _ in range(_HALVINGS if alone["gap_p99_ms"] <= self.gap_p99_ms else 0):
            rate = (low + high) / 2
            told = at(rate)
            if told["ttft_p90_ms"] <= self.ttft_p90_ms and told["gap_p99_ms"] <= self.gap_p99_ms:
                low, best = rate, told
            else:
                high = rate
        overload = at(_OVERLOAD * (low or capacity))
        return {
            "assistant_rate": low,
            "assistant_capacity": capacity,
            "assistant_ttft_p90_ms": best["ttft_p90_ms"] if best else alone["ttft_p90_ms"],
            "assistant_gap_p99_ms": best["gap_p99_ms"] if best else alone["gap_p99_ms"],
            "assistant_overload_ttft_p90_ms": overload["ttft_p90_ms"],
            "assistant_overload_queue": overload["longest_queue"],
        }

    def units(self) -> Mapping[str, tuple[str, bool]]:
        """Return the metrics: rates first."""
        return {
            "assistant_rate": ("requests/s", True),
            "assistant_capacity": ("requests/s", True),
            "assistant_ttft_p90_ms": ("ms", False),
            "assistant_gap_p99_ms": ("ms", False),
            "assistant_overload_ttft_p90_ms": ("ms", False),
            "assistant_overload_queue": ("requests", False),
        }


class Documents(Scenario):
    """Tokens a second for a batch of long jobs, and what a million of them cost."""

    documents: Count = Field(default=16, description="jobs")
    together: Count = Field(default=8, description="jobs at once")
    prompt_tokens: Count = Field(default=256, description="tokens of each prompt")
    new_tokens: Annotated[int, Field(ge=2, le=1_000_000)] = Field(default=128, description="tokens of each document")
    price_per_hour: Annotated[float, Field(gt=0)] | None = Field(default=None, description="what an hour of this machine costs")

    def serve(self, arm: Opened) -> dict[str, float]:
        """Write all documents."""
        prompts = arm.task.prompts(arm.subject, self.documents, self.prompt_tokens)
        engine = arm.engine
        for _ in engine.further(engine.first(prompts[: self.together]), 2):
            pass
        start = time.perf_counter()
        for part in prompts.split(self.together):
            token = engine.first(part)
            for token in engine.further(token, self.new_tokens - 1):  # noqa: B020
                token[0].item()
        seconds = time.perf_counter() - start
        engine.reset()
        rate = self.documents * self.new_tokens / seconds
        cost = {"documents_cost_per_million": self.price_per_hour / 3600 / rate * 1e6} if self.price_per_hour else {}
        return {"documents_tokens_per_second": rate, "documents_seconds": seconds, **cost}

    def units(self) -> Mapping[str, tuple[str, bool]]:
        """Return the metrics."""
        cost: dict[str, tuple[str, bool]] = {"documents_cost_per_million": ("money", False)} if self.price_per_hour else {}
        return {"documents_tokens_per_second": ("tokens/s", True), "documents_seconds": ("s", False), **cost}


def scenarios_of(measure: Mapping[str, Any]) -> dict[str, Scenario]:
    """Return the scenarios among the meters of a recipe."""
    return {name: meter for name, meter in measure.items() if isinstance(meter, Scenario)}
