"""Requests of several sizes after one another: what a server with few and many users, short and long prompts spends on all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from optkit.core.group import Group
from optkit.core.measurement import Array, Metric, Samples
from optkit.core.settings import Settings
from optkit.measure.contract import Opened

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Load(Settings):
    """One request of a mixed workload."""

    sequences: Count = Field(default=1, description="sequences at once")
    prompt_tokens: Count = Field(description="tokens of each prompt")
    new_tokens: Annotated[int, Field(ge=2, le=1_000_000)] = Field(description="tokens generated for each prompt")


class MixedSession:
    """One request of each load in turn; a block is a whole request."""

    def __init__(self, arm: Opened, mix: Sequence[Load], group: Group) -> None:
        self._engine, self._mix, self._group = arm.engine, mix, group
        self._prompts: list[Tensor] = []
        for load in mix:
            rows = group.rows(load.sequences)
            self._prompts.append(arm.task.prompts(arm.subject, load.sequences, load.prompt_tokens)[rows])
        self._number = 0

    def block(self) -> Mapping[str, list[float]]:
        """Serve the next request; return its time in ms."""
        load, prompts = self._mix[self._number], self._prompts[self._number]
        self._number = (self._number + 1) % len(self._mix)
        if hasattr(self._engine, "forget"):
            self._engine.forget()
        self._group.wait()
        start = time.perf_counter()
        if len(prompts):
            tokens = self._engine.first(prompts)
            tokens[0].item()
            for tokens in self._engine.further(tokens, load.new_tokens - 1):  # noqa: B020
                tokens[0].item()
        return {"requests_ms": self._group.slowest([1e3 * (time.perf_counter() - start)])}


def mixed_metrics(mix: Sequence[Load]) -> tuple[Metric, ...]:
    """Return what is made of the times: that of all requests together, and the tokens a second."""
    tokens = sum(load.sequences * load.new_tokens for load in mix)

    def total_ms(columns: Samples) -> Array:
        return np.asarray(columns["requests_ms"].sum(-1))

    return (
        Metric("mix_ms", "ms", False, lambda c: np.median(total_ms(c), axis=-1), total_ms),
        Metric(
            "mix_tokens_per_second",
            "tokens/s",
            True,
            lambda c: tokens / np.median(total_ms(c), axis=-1) * 1e3,
            lambda c: tokens / total_ms(c) * 1e3,
        ),
    )
