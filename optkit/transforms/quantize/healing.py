"""A short training of a whole model on calibration data, to win back what compressing it has cost. It heals, it does not teach.

The loss is the divergence from a teacher's answers (data-free distillation for quantized models: Liu et al. 2023, arXiv 2305.17888, here
on real text), or the next token's cross entropy. Everything is drawn from one seed, in float32, without dropout: two runs on one machine
with as many threads end in the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration

Batch = Mapping[str, Tensor]
_WARM_UP_SHARE = 0.1
_TOLD = 10  # times


@dataclass(frozen=True)
class Course:
    """How long and how fast to train. ``length`` is the most tokens of a sequence; ``batch_size`` counts sequences, or items."""

    steps: int
    learning_rate: float
    batch_size: int
    length: int
    seed: int


def heal(student: nn.Module, teacher: nn.Module | None, data: Calibration, course: Course) -> None:
    """Train the student's parameters in place by AdamW, with a rate that rises for a tenth of the steps and falls along a cosine to 0.

    Weights that are exactly zero stay zero: what pruning has taken stays taken. The student runs as in ``eval``, so no dropout is drawn.
    In memory at once: the student's parameters, their gradients and two averages of these, and the teacher.

    Args:
        student: what is trained; parameters that ask for no gradient are left alone.
        teacher: whose answers are the goal; None for the next token of the text, which only causal language models predict.
        data: what both see; where there are fewer sequences than the steps take, they come again in another order.
        course: how long and how fast.

    Raises:
        TransformError: nothing asks for a gradient, or the loss is no number or cannot be taken without a teacher.
    """
    batches = _endless(data.batches, course)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise TransformError("no parameter asks for a gradient, so there is nothing to train: model.requires_grad_(True)")
    zeros = [(parameter, parameter == 0) for parameter in parameters if parameter.ndim > 1 and bool((parameter == 0).any())]
    optimizer = torch.optim.AdamW(parameters, lr=course.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    modes = {module: module.training for model in (student, teacher) if model is not None for module in model.modules()}
    lately: list[float] = []
    try:
        for module in modes:
            module.training = False
        for step, batch in zip(range(1, course.steps + 1), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = course.learning_rate * _share(step, course.steps)
            with torch.enable_grad():
                loss = _loss(student, teacher, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                for parameter, zero in zeros:
                    parameter.masked_fill_(zero, 0)
            lately.append(float(loss.detach()))
            if not math.isfinite(lately[-1]):
                raise TransformError(f"the loss is {lately[-1]} at step {step}; use a learning_rate below {course.learning_rate}")
            if step % max(1, course.steps // _TOLD) == 0:
                data.tell(f"step {step} of {course.steps}, loss {sum(lately) / len(lately):.4f}")
                lately.clear()
    finally:
        optimizer.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training


def answers_loss(answers: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean divergence KL(wanted || answers), in nats, of distributions given by logits (..., classes).

    ``mask`` (...) holds 0 where a position does not count.
    """
    kept = wanted.float().log_softmax(-1)
    each = (kept.exp() * (kept - answers.float().log_softmax(-1))).sum(-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1)


def _loss(student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Tensor:
    output = student(**_in_dtype_of(student, batch))
    answers = _answers(output)
    if teacher is None:
        ids = batch.get("input_ids")
        if ids is None or not _is_causal(student):
            raise TransformError(
                f"{type(student).__name__} is no causal language model, so its data has no next token to learn; "
                "use distill: true, or train it by a loop of your own between prepare and convert"
            )
        wanted = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100) if "attention_mask" in batch else ids[:, 1:]
        return functional.cross_entropy(answers[:, :-1].float().flatten(0, 1), wanted.flatten())
    with torch.no_grad():
        taught = _answers(teacher(**_in_dtype_of(teacher, batch)))
    if hasattr(output, "logits") and answers.shape[-1] > 1:
        mask = batch.get("attention_mask")
        return answers_loss(answers, taught, mask if mask is not None and mask.shape == answers.shape[:-1] else None)
    return functional.mse_loss(answers.float(), taught.float()) / taught.float().square().mean().clamp(min=1e-12)


def _in_dtype_of(module: nn.Module, batch: Batch) -> Batch:
    """Return the batch with its floats in the dtype of the module's first parameter: a teacher may stand in half precision."""
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def _answers(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TransformError(
            f"the model returns {type(output).__name__}, which is no tensor and has no logits: train it in a loop of your own"
        )
    return found


def _is_causal(module: nn.Module) -> bool:
    generates = getattr(module, "can_generate", None)
    return callable(generates) and bool(generates())


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
