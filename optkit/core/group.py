"""The processes that serve one subject together. A group of one does nothing; a larger one splits batches and waits for the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from optkit.core.mesh import Mesh, Place


def share_of(count: int, parts: int, index: int) -> slice:
    """Return one part of ``count`` things: consecutive, in order, the remainder spread over the first parts."""
    share, rest = divmod(count, parts)
    start = index * share + min(index, rest)
    return slice(start, start + share + (index < rest))


@dataclass(frozen=True)
class Group:
    """This process's place among its peers. All ranks make the same calls in the same order.

    ``mesh`` says what the ranks are for; by default each holds a whole copy of the model.
    """

    rank: int = 0
    size: int = 1
    mesh: Mesh | None = None

    def arranged(self, mesh: Mesh) -> Group:
        """Return the same group in these roles."""
        return replace(self, mesh=mesh)

    @property
    def place(self) -> Place:
        """What this process is for."""
        return self._mesh.place(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that hold one copy of the model together: the one that writes."""
        return self.rank % self._mesh.parts == 0

    def rows(self, count: int) -> slice:
        """Return this replica's share of ``count`` rows: consecutive, in order, the remainder spread over the first replicas."""
        return share_of(count, self._mesh.data, self.place.data)

    def join(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all replicas, concatenated in order; of each replica, what its first process gives."""
        parts = self._gather(list(values))
        return [value for rank, part in enumerate(parts) if rank % self._mesh.parts == 0 for value in part]

    def slowest(self, times_ms: Sequence[float]) -> list[float]:
        """Return the largest value over all ranks, for each position; a rank without work gives an empty list."""
        parts = [part for part in self._gather(list(times_ms)) if part]
        return [max(values) for values in zip(*parts, strict=True)]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    @property
    def _mesh(self) -> Mesh:
        return self.mesh or Mesh(data=self.size)

    def _gather(self, values: list[Any]) -> list[list[Any]]:
        if self.size == 1:
            return [values]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return parts


ALONE = Group()
