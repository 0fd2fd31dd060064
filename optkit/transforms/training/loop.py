"""A short training of a whole model on calibration data, to win back what compressing it has cost. It heals, it does not teach.

Everything is drawn from one seed, in float32: two runs on one machine with as many threads end in the same weights, and so does one
that was interrupted at any moment and went on from its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.group import Group
from optkit.core.subject import Calibration
from optkit.transforms.training.checkpoints import Checkpoints, fingerprint
from optkit.transforms.training.shared import SharedSteps
from optkit.transforms.training.zeros import Zeros

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
_WARM_UP_SHARE = 0.1
_TOLD = 50  # times
_KEEP_EVERY_S = 60.0


@dataclass(frozen=True)
class Course:
    """How long and how fast to train. ``length`` is the most tokens of a sequence; ``batch_size`` counts sequences, or items.

    ``sharded``: several processes share the weights too, and not the batches alone.
    """

    steps: int
    learning_rate: float
    batch_size: int
    length: int
    seed: int
    accumulation: int = 1
    dropout: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    sharded: bool = False


def heal(
    student: nn.Module,
    loss_of: Loss,
    data: Calibration,
    course: Course,
    after_step: Callable[[int], None] | None = None,
    keep_every_s: float = _KEEP_EVERY_S,
) -> list[float]:
    """Train the student's parameters in place by AdamW, with a rate that rises for a tenth of the steps and falls along a cosine to 0.

    Weights that are exactly zero stay zero: what pruning has taken stays taken. In memory at once: the student's parameters, their
    gradients and two averages of these.

    Where ``data.group`` has several processes, each takes its rows of every batch, and their gradients are added up.

    Where ``data.checkpoints`` names a folder, the state is kept there about once a minute, and a training that was interrupted goes
    on from the last state that is whole.

    Args:
        student: what is trained; parameters that ask for no gradient are left alone.
        loss_of: the loss of a student on a batch.
        data: what it sees; where there are fewer sequences than the steps take, they come again in another order.
        course: how long and how fast.
        after_step: called with the number of each finished step; the weights that it sets to zero stay so as well.
        keep_every_s: seconds between checkpoints; 0: after every step.

    Returns:
        the loss of each step.

    Raises:
        TransformError: nothing asks for a gradient, or the loss is no number.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise TransformError("no parameter asks for a gradient, so there is nothing to train: model.requires_grad_(True)")
    batches = _endless(data.batches, course)
    start = _start(student, data, course) if data.checkpoints is not None else ""
    shared = _shared(student, data.group, course)
    zeros = Zeros(shared.kept)
    optimizer = torch.optim.AdamW(shared.parameters, lr=course.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    with _drawing(course.seed), _mode(shared.trained, course.dropout):
        kept = Checkpoints(data.checkpoints / shared.owns_checkpoints(), start, shared.kept, optimizer) if data.checkpoints else None
        losses = kept.restore(data.tell, shared.common(kept.newest())) if kept else []
        if after_step and losses:
            zeros.note()
        deque(islice(batches, len(losses) * course.accumulation), maxlen=0)  # those that these steps have seen
        progress = _Progress(data.tell, course.steps, losses)
        try:
            while len(losses) < course.steps:
                losses.append(_step(loss_of, batches, course, optimizer, len(losses) + 1, shared))
                zeros.apply()
                if after_step:
                    after_step(len(losses))
                    zeros.note()
                if kept and len(losses) < course.steps and shared.is_due(kept.is_due(keep_every_s)):
                    kept.save(losses)
                progress.step()
        finally:
            shared.forget()
    shared.end()
    return losses


class _Progress:
    """Tells some fifty times how far a training is, and how long it will still take."""

    def __init__(self, tell: Callable[[str], None], steps: int, losses: list[float]) -> None:
        self._tell, self._steps, self._losses = tell, steps, losses
        self._first = self._told = len(losses)
        self._begun = time.monotonic()

    def step(self) -> None:
        """Hear that the losses have one more."""
        done = len(self._losses)
        if done - self._told >= max(1, self._steps // _TOLD) or done == self._steps:
            lately = self._losses[self._told :]
            left = (time.monotonic() - self._begun) / (done - self._first) * (self._steps - done)
            self._tell(f"step {done} of {self._steps}, loss {sum(lately) / len(lately):.4f}, {_spelled(left)} left")
            self._told = done


def _step(
    loss_of: Loss,
    batches: Iterator[Batch],
    course: Course,
    optimizer: torch.optim.Optimizer,
    step: int,
    shared: SharedSteps,
) -> float:
    total = 0.0
    for group in optimizer.param_groups:
        group["lr"] = course.learning_rate * _share(step, course.steps)
    shared.forget()
    shared.draw(course.seed, step)
    with torch.enable_grad():
        for batch in islice(batches, course.accumulation):
            own, share = shared.rows(batch)
            if share:
                with torch.autocast("cpu", torch.bfloat16, enabled=course.precision == "bfloat16"):
                    loss = loss_of(shared.trained, own) * (share / course.accumulation)
                loss.backward()
                total += float(loss.detach())
    total = shared.add_up(total)
    if not math.isfinite(total):
        raise TransformError(f"the loss is {total} at step {step}; use a learning_rate below {course.learning_rate}")
    optimizer.step()
    return total


def _start(student: nn.Module, data: Calibration, course: Course) -> str:
    """Return what tells this training from others, for its checkpoints."""
    known = asdict(course) if course.sharded else {name: value for name, value in asdict(course).items() if name != "sharded"}
    return fingerprint(student, data.batches, known | ({"ranks": data.group.size} if data.group.size > 1 else {}))


def _shared(student: nn.Module, group: Group, course: Course) -> SharedSteps:
    if not course.sharded or group.size == 1:
        return SharedSteps(group, student)
    from optkit.transforms.training.sharded import ShardedSteps

    return ShardedSteps(group, student)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draw from this seed, and let the caller go on with its own numbers afterwards."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def _mode(student: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in student.modules()}
    student.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before


def _spelled(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _share(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step that counts from 1."""
    return min(1.0, step / max(1.0, _WARM_UP_SHARE * steps)) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def _endless(batches: Sequence[Batch], course: Course) -> Iterator[Batch]:
    """Yield batches of ``batch_size`` rows in an order drawn from the seed, anew whenever all have been seen."""
    rows = _rows(batches, course.length)
    draw = torch.Generator().manual_seed(course.seed)
    alike = len({tuple((name, tensor.shape[1:]) for name, tensor in sorted(row.items())) for row in rows}) == 1
    size = min(course.batch_size, len(rows)) if alike else 1  # rows of different lengths cannot stand in one batch

    def draw_forever() -> Iterator[Batch]:
        while True:
            order = torch.randperm(len(rows), generator=draw).tolist()
            for start in range(0, len(rows) - size + 1, size):
                chosen = [rows[index] for index in order[start : start + size]]
                yield {name: torch.cat([row[name] for row in chosen]) for name in chosen[0]}

    return draw_forever()


def _rows(batches: Sequence[Batch], length: int) -> list[Batch]:
    """Return every item as a batch of one; those of tokens are cut into pieces of ``length``."""
    rows: list[Batch] = []
    for batch in batches:
        ids = batch.get("input_ids")
        cut = ids is not None and ids.ndim == 2 and all(tensor.shape == ids.shape for tensor in batch.values())
        for index in range(len(next(iter(batch.values())))):
            row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            if cut:
                most = row["input_ids"].shape[1]
                starts = range(0, max(1, most // length) * length, length)
                rows += [{name: tensor[:, start : start + length] for name, tensor in row.items()} for start in starts]
            else:
                rows.append(row)
    return rows
