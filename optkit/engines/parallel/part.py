"""What one process holds of a model, and how it reaches those that hold the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optkit.core.group import share_of
from optkit.core.mesh import Mesh, Place
from optkit.kernels.peers import Peers


@dataclass
class Part:
    """``peers`` hold the other shards of the same layers; ``line`` is the process group of the stages, None where there is one alone.

    ``vocabulary`` is the number of token ids of the whole model, once it was cut. ``stages`` counts the blocks of each stage; empty: as
    many in each.
    """

    mesh: Mesh
    place: Place
    peers: Peers | None = None
    line: Any = None
    stages: tuple[int, ...] = ()
    micro_batches: int = 1
    vocabulary: int = field(default=0, init=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all shards' tensors.

        Raises:
            ArmError: a shard does not come.
        """
        assert self.peers is not None, "a shard on the meta device cannot run"
        return self.peers.sum(tensor)

    def gather(self, part: Tensor, total: int, start: int) -> Tensor:
        """Return (..., total): all shards' (..., n) side by side, this one's beginning at ``start``.

        Raises:
            ArmError: a shard does not come.
        """
        whole = torch.zeros(*part.shape[:-1], total, dtype=part.dtype, device=part.device)
        whole[..., start : start + part.shape[-1]] = part
        return self.sum(whole)

    def gather_rows(self, part: Tensor) -> Tensor:
        """Return the logits (..., v) of which each shard has its share of the vocabulary.

        Raises:
            ArmError: a shard does not come.
        """
        return self.gather(part, self.vocabulary, share_of(self.vocabulary, self.mesh.tensor, self.place.tensor).start)

    @property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return self.place.pipeline == 0

    @property
    def is_last(self) -> bool:
        """Whether it makes logits."""
        return self.place.pipeline == self.mesh.pipeline - 1
