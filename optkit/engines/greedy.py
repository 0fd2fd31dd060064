"""The greedy choice of tokens, one after another: what is timed, and what engines that overlap tokens do in their own way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Greedy:
    """The base of engines that give the logits of each step."""

    @abstractmethod
    def prefill(self, request: Any) -> Tensor:
        """Take (b, p) input ids, or what an encoder reads; fill the cache and return the (b, v) logits of the next token."""

    @abstractmethod
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""

    def first(self, request: Any) -> Tensor:
        """Take what ``prefill`` takes, fill the cache and return the (b,) most likely next tokens."""
        return self.prefill(request).argmax(-1)

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times."""
        for _ in range(count):
            token_ids = self.step(token_ids).argmax(-1)
            yield token_ids
