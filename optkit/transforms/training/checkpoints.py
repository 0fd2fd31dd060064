"""The state of a training on disk, whole or not there: safetensors and JSON behind a manifest with digests, the last two of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optkit.core import files
from optkit.core.errors import ArtefactError

_STATE, _TENSORS = "state.json", "tensors.safetensors"
_KEPT = 2


def fingerprint(student: nn.Module, batches: Sequence[Mapping[str, Tensor]], course: Mapping[str, Any]) -> str:
    """Return a digest of all that a training starts from: weights, data and course. Another start has no use for its checkpoints."""
    found = hashlib.sha256(json.dumps(course, sort_keys=True).encode())
    named = list(student.state_dict().items())
    for index, batch in enumerate(batches):
        named += [(f"{index}.{name}", batch[name]) for name in sorted(batch)]
    for name, tensor in named:
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(tensor.requires_grad)}".encode())
            found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class Checkpoints:
    """Keeps and finds again what a training has come to: weights, averages of the optimizer, random numbers, losses."""

    def __init__(self, folder: Path, start: str, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._folder = folder
        self._start = start
        self._student = student
        self._optimizer = optimizer
        self._saved = time.monotonic()

    def is_due(self, every_s: float) -> bool:
        """Say whether the last time, or the beginning, is so long ago."""
        return time.monotonic() - self._saved >= every_s

    def save(self, losses: Sequence[float]) -> None:
        """Keep the state after so many steps as there are losses, then let go of all but the last two.

        One of so many steps that is there already is damaged, of another start, or further than other processes had come.
        """
        place = self._folder / f"step-{len(losses):07d}"
        shutil.rmtree(place, ignore_errors=True)
        with files.build_folder(place) as aside:
            save_file(self._tensors(), aside / _TENSORS)
            files.write_json(aside / _STATE, {"start": self._start, "losses": list(losses)})
        for old in self._found()[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        self._saved = time.monotonic()

    def newest(self) -> int:
        """Return after how many steps the last state was kept that is whole and belongs to this start; 0 where there is none."""
        return next((len(losses) for _, losses in self._whole()), 0)

    def restore(self, tell: Callable[[str], None], steps: int | None = None) -> list[float]:
        """Go back to the last such state, or to that after so many steps; return its losses, none where there is no such state."""
        for folder, losses in self._whole():
            if steps is None or len(losses) == steps:
                self._load(load_file(folder / _TENSORS))
                tell(f"going on after step {len(losses)}")
                return losses
        return []

    def _whole(self) -> Iterator[tuple[Path, list[float]]]:
        for folder in self._found():
            try:
                files.verify(folder)
                state = files.read_json(folder / _STATE)
            except ArtefactError:
                continue
            if state["start"] == self._start:
                yield folder, list(state["losses"])

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), reverse=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in _own(self._student).items()}
        tensors["random"] = torch.get_rng_state()
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in _own(self._student).items():
            tensor.copy_(tensors[f"model.{name}"])
        torch.set_rng_state(tensors["random"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": states})


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers, each once."""
    first: dict[int, str] = {}
    saved = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    return {name: tensor for name, tensor in saved.items() if first.setdefault(id(tensor), name) == name}
