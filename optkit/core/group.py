"""The processes that serve one subject together. A group of one does nothing; a larger one splits batches and waits for the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """This process's place among its peers. All ranks make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    def rows(self, count: int) -> slice:
        """Return this rank's share of ``count`` rows: consecutive, in order, the remainder spread over the first ranks."""
        share, rest = divmod(count, self.size)
        start = self.rank * share + min(self.rank, rest)
        return slice(start, start + share + (self.rank < rest))

    def join(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all ranks, concatenated in rank order."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def slowest(self, times_ms: Sequence[float]) -> list[float]:
        """Return the largest value over all ranks, for each position; a rank without work gives an empty list."""
        if self.size == 1:
            return list(times_ms)
        parts = [part for part in self.join([list(times_ms)]) if part]
        return [max(values) for values in zip(*parts, strict=True)]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()
