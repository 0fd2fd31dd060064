"""What the baseline answered, kept so that every arm is compared with one and the same pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_BUDGET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Answers:
    """Shapes: w windows, t scored positions, k of them with whole distributions, v vocabulary, p prompts, n continued tokens."""

    top1: Tensor  # (w, t) most likely token ids
    log_probabilities: Tensor  # (w, k, v) at ``kept_positions``
    greedy: Tensor  # (p, n) continuations

    def write(self, folder: Path, rank: int) -> None:
        """Leave one rank's answers in the folder."""
        tensors = {"top1": self.top1, "log_probabilities": self.log_probabilities, "greedy": self.greedy}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"answers-{rank:04d}.safetensors")

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """Return the answers of all ranks, in order."""
        parts = [load_file(path) for path in sorted(folder.glob("answers-*.safetensors"))]
        return cls(*(torch.cat([part[name] for part in parts]) for name in ("top1", "log_probabilities", "greedy")))


def kept_positions(windows: int, positions: int, vocabulary: int) -> Tensor:
    """Return which of a window's positions keep their whole distribution: evenly spread, 256 MiB in all at the most, at least one."""
    affordable = _BUDGET_BYTES // (windows * vocabulary * 4)
    count = max(1, min(positions, affordable))
    return torch.linspace(0, positions - 1, count).round().long()
