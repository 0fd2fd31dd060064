"""Trains a network on the task of a recipe. The result is kept in the user's cache under a digest of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optkit.core import files
from optkit.core.cache import cache_folder
from optkit.core.errors import ArtefactError, OptkitError
from optkit.core.subject import Calibration
from optkit.models import artefact
from optkit.models.networks import Network
from optkit.models.sources import fresh, reference_tokenizer
from optkit.tasks.supervised import ANSWERS, Examples, Supervised
from optkit.transforms.training.loop import Course, heal

Tell = Callable[[str], None]
_SCHEMA = 1  # of what a training depends on; another one trains anew
_RECORD, _STATE, _TENSORS = "training.json", "state.json", "tensors.safetensors"
_WHOLE = 1_000_000_000  # tokens: items are not cut


@dataclass(frozen=True)
class Taught:
    """A trained network: the folder of its artefact, and how the training went."""

    artefact: Path
    record: dict[str, Any]


def taught(network: Network, task: Supervised, seed: int, tell: Tell) -> Taught:
    """Return the trained network, after training it where it is not there yet.

    A training that was interrupted goes on; the state with the least loss on the validation items is what counts.

    Raises:
        ModelError: the network is for other tasks.
        DataError: there are no items, or one is broken.
    """
    place = _place(network, task, seed)
    if not (place / _RECORD).exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            tell("another process trains this network; waiting for it")
            lock.acquire()
        try:
            if not (place / _RECORD).exists():
                _teach(network, task, seed, place, tell)
        finally:
            lock.release()
    return Taught(place / "artefact", files.read_json(place / _RECORD))


def is_taught(network: Network, task: Supervised, seed: int) -> bool:
    """Say whether it was trained before."""
    return (_place(network, task, seed) / _RECORD).exists()


def _teach(network: Network, task: Supervised, seed: int, place: Path, tell: Tell) -> None:
    subject = fresh(network, task.needs(reference_tokenizer()), seed)
    work = place.with_suffix(".work")
    training, tokenizer = network.training, subject.tokenizer
    found = task.examples("training", tokenizer)
    batches = tuple({**inputs, ANSWERS: answers} for inputs, answers in found.batches())
    course = Course(training.steps, training.learning_rate, training.batch_size, _WHOLE, seed, dropout=training.dropout)
    best = _Best(subject.module, task, task.examples("validation", tokenizer), network, work / "best")

    def loss_of(module: nn.Module, batch: Any) -> Tensor:
        return task.loss(module(**{name: tensor for name, tensor in batch.items() if name != ANSWERS}), batch[ANSWERS])

    told = Calibration(batches, checkpoints=work / "checkpoints", tell=lambda text: tell(f"training {subject.source}: {text}"))
    try:
        heal(subject.module, loss_of, told, course, after_step=best.look)
    except _EnoughError:
        tell(f"training {subject.source}: no better for {training.patience} looks, ended after {best.steps} steps")
    with files.build_folder(place, _RECORD) as aside:
        artefact.save(replace(subject, module=best.restored()), aside / "artefact")
        files.write_json(aside / _RECORD, {"schema": _SCHEMA, "steps": best.steps, "best": best.record, "looks": best.looks})
    shutil.rmtree(work, ignore_errors=True)


class _EnoughError(Exception):
    """It gets no better."""


class _Best:
    """The state with the least loss on the validation items, on disk: an interrupted training must not forget it."""

    def __init__(self, module: nn.Module, task: Supervised, examples: Examples, network: Network, folder: Path) -> None:
        self._module, self._task, self._examples, self._training, self._folder = module, task, examples, network.training, folder
        self.steps = 0
        self.looks: list[dict[str, float]] = []
        self.record = self._kept()

    def look(self, step: int) -> None:
        """Judge the state after a step, every so many, and keep it where it is the best.

        Raises:
            _EnoughError: the last looks have found none better.
        """
        self.steps = step
        if step % self._training.check_every and step != self._training.steps:
            return
        loss = self._loss()
        self.looks.append({"step": step, "loss": loss})
        if not self.record or loss < self.record["loss"]:
            self.record = {"step": step, "loss": loss}
            shutil.rmtree(self._folder, ignore_errors=True)
            with files.build_folder(self._folder) as aside:
                save_file(
                    {name: tensor.detach().clone() for name, tensor in artefact.distinct_tensors(self._module).items()}, aside / _TENSORS
                )
                files.write_json(aside / _STATE, self.record)
        elif step - self.record["step"] >= self._training.patience * self._training.check_every:
            raise _EnoughError

    def restored(self) -> nn.Module:
        """Return the module in its best state."""
        self._module.load_state_dict(load_file(self._folder / _TENSORS), strict=False)
        return self._module.eval()

    def _kept(self) -> dict[str, float]:
        try:
            files.verify(self._folder)
        except ArtefactError:
            return {}
        found: dict[str, float] = files.read_json(self._folder / _STATE)
        return found

    @torch.no_grad()
    def _loss(self) -> float:
        was_training = self._module.training
        self._module.eval()
        total = 0.0
        for inputs, answers in self._examples.batches():
            total += float(self._task.loss(self._module(**inputs), answers)) * len(answers)
        self._module.train(was_training)
        return total / len(self._examples)


def _place(network: Network, task: Supervised, seed: int) -> Path:
    cache = cache_folder()
    if cache is None:
        raise OptkitError("trained networks are kept in the cache folder, and it cannot be written; set OPTKIT_CACHE to a folder of yours")
    sides = {side: task.sides.sha256(side) for side in ("training", "validation")}
    known = {
        "schema": _SCHEMA,
        "network": network.model_dump(mode="json"),
        "task": task.model_dump(mode="json", exclude=set(task.only_judging)),
        "seed": seed,
        **sides,
    }
    digest = hashlib.sha256(json.dumps({"word": type(network).__name__, **known}, sort_keys=True).encode()).hexdigest()
    return cache / "trained" / f"{type(network).__name__.lower()}-{task.word()}-{digest[:16]}"
