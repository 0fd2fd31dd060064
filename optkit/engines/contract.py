"""The contract of an engine: how a subject executes. Generating subjects have ``prefill`` and ``step``, the others ``forward``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """Executes a generating subject. Shapes: batch of b sequences, p prompt tokens, v token ids."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""

    def first(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b,) most likely next tokens."""

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times. An engine may work ahead of what it yields."""

    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, each position judged from the past that this engine keeps of the others.

        The cache of a request in progress is left as it is.
        """

    def cache_bytes(self) -> int:
        """Return the bytes that keys and values of the request in progress take, spare room included; 0 where there is none."""

    def reset(self) -> None:
        """Forget the cache."""


class ForwardEngine(Protocol):
    """Executes a subject that does not generate."""

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the subject's output for one batch of inputs."""
