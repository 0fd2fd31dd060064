"""How many processes serve a subject together, and what each of them is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One process's part: which replica it belongs to, which stage of it, and which shard of that."""

    data: int = 0
    pipeline: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Mesh:
    """``data`` replicas, each of ``pipeline`` stages, each of ``tensor`` shards. Shards of a stage are neighbours in rank."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.data * self.pipeline * self.tensor

    @property
    def parts(self) -> int:
        """The processes that hold one copy of the model together."""
        return self.pipeline * self.tensor

    def place(self, rank: int) -> Place:
        """Return the part of the process with this number."""
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Place(data, pipeline, tensor)


ALONE = Mesh()
