"""What a student learns from a teacher: its answers, its hidden states, where it looks; and the next token of the text itself.

Usable in any training loop: ``Distillation(teacher)(student, batch)`` is a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.engines.eager import floats_of, in_dtype

Batch = Mapping[str, Tensor]


class Distillation:
    """A loss: ``logits`` times the divergence of the answers, and so on for the others; a part with weight 0 is not computed.

    Args:
        teacher: whose answers are the goal; it is set to ``eval``. None: only the next token of the text is learned.
        temperature: logits are divided by it, and the divergence multiplied by its square (Hinton et al. 2015, arXiv 1503.02531).
        logits: weight of the divergence KL(teacher || student), in nats a token.
        hidden: weight of the squared distance of the hidden states, as a share of the teacher's square (as in TinyBERT: Jiao et al.
            2019, arXiv 1909.10351). A student of fewer blocks is held to the teacher's states at the same relative depth.
        attention: weight of the divergence of where the heads look, averaged over the heads, at the same relative depth. Both models
            then compute their attention eagerly, which is slower.
        next_token: weight of the cross entropy of the next token.

    Raises:
        TransformError: no part has a weight, or a part needs a teacher and there is none.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        temperature: float = 1.0,
        logits: float = 1.0,
        hidden: float = 0.0,
        attention: float = 0.0,
        next_token: float = 0.0,
    ) -> None:
        if teacher is None and (logits or hidden or attention):
            raise TransformError("without a teacher there are no answers to learn: logits=0, hidden=0, attention=0, next_token=1")
        if not (logits or hidden or attention or next_token):
            raise TransformError("nothing would be learned: give logits, hidden, attention or next_token a weight")
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self._temperature = temperature
        self._logits, self._hidden, self._attention, self._next_token = logits, hidden, attention, next_token
        self._asked = {"output_hidden_states": True} if hidden else {}
        self._asked |= {"output_attentions": True} if attention else {}
        if attention:
            _look_eagerly(teacher)

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a student on a batch: keyword arguments of both models.

        Raises:
            TransformError: the models have no such answers, or theirs do not compare.
        """
        if self._attention:
            _look_eagerly(student)
        output = student(**in_dtype_of(student, batch), **self._asked)
        parts = []
        if self.teacher is not None and (self._logits or self._hidden or self._attention):
            with torch.no_grad():
                taught = self.teacher(**in_dtype_of(self.teacher, batch), **self._asked)
            mask = batch.get("attention_mask")
            if self._logits:
                parts.append(self._logits * _answers_apart(output, taught, mask, self._temperature))
            if self._hidden:
                parts.append(self._hidden * _states_apart(_listed(output, "hidden_states"), _listed(taught, "hidden_states")))
            if self._attention:
                parts.append(self._attention * _looks_apart(_listed(output, "attentions"), _listed(taught, "attentions")))
        if self._next_token:
            parts.append(self._next_token * next_token_loss(student, output, batch))
        return torch.stack(parts).sum()


def answers_loss(answers: Tensor, wanted: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence KL(wanted || answers), in nats, of distributions given by logits (..., classes) over a temperature.

    It is multiplied by the square of the temperature, so that gradients keep their size. ``mask`` (...) holds 0 where a position does
    not count.
    """
    kept = (wanted.float() / temperature).log_softmax(-1)
    each = (kept.exp() * (kept - (answers.float() / temperature).log_softmax(-1))).sum(-1) * temperature**2
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1)


def next_token_loss(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """Return the cross entropy of the next token, in nats.

    Raises:
        TransformError: the model predicts none.
    """
    ids = batch.get("input_ids")
    generates = getattr(model, "can_generate", None)
    if ids is None or not (callable(generates) and generates()):
        raise TransformError(
            f"{type(model).__name__} is no causal language model, so its data has no next token to learn; learn a teacher's answers, "
            "or train it in a loop of your own"
        )
    wanted = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100) if "attention_mask" in batch else ids[:, 1:]
    return functional.cross_entropy(answers_of(output)[:, :-1].float().flatten(0, 1), wanted.flatten())


def in_dtype_of(module: nn.Module, batch: Batch) -> Batch:
    """Return the batch with its floats in the dtype of the module's first parameter: a teacher may stand in half precision."""
    return in_dtype(floats_of(module) or torch.float32, batch)


def answers_of(output: Any) -> Tensor:
    """Return the logits of a model's output, or the output where it is a tensor; of a model that marks pieces, those of both ends.

    Raises:
        TransformError: it is neither.
    """
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-2)  # (b, 2, t): one distribution over the text for each end
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TransformError(
            f"the model returns {type(output).__name__}, which is no tensor and has no logits: train it in a loop of your own"
        )
    return found


def _answers_apart(output: Any, taught: Any, mask: Tensor | None, temperature: float) -> Tensor:
    answers, wanted = answers_of(output), answers_of(taught)
    if answers.shape != wanted.shape:
        raise TransformError(f"the teacher answers with {tuple(wanted.shape)}, the student with {tuple(answers.shape)}")
    if not isinstance(output, Tensor) and answers.shape[-1] > 1:
        fits = mask is not None and mask.shape == answers.shape[:-1]
        return answers_loss(answers, wanted, mask if fits else None, temperature)
    return functional.mse_loss(answers.float(), wanted.float()) / wanted.float().square().mean().clamp(min=1e-12)


def _states_apart(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    if mine[0].shape[-1] != theirs[0].shape[-1]:
        raise TransformError(
            f"the student's hidden states are {mine[0].shape[-1]} wide, the teacher's {theirs[0].shape[-1]}: they do not compare; hidden: 0"
        )
    pairs = [(state.float(), theirs[place].float()) for state, place in _at_equal_depth(mine, theirs)]
    return torch.stack([(a - b).square().mean() / b.square().mean().clamp(min=1e-12) for a, b in pairs]).mean()


def _looks_apart(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    found = []
    for looks, place in _at_equal_depth(mine, theirs):
        a, b = looks.float().mean(1).clamp(min=1e-12), theirs[place].float().mean(1).clamp(min=1e-12)
        found.append((b * (b.log() - a.log())).sum(-1).mean())
    return torch.stack(found).mean()


def _at_equal_depth(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> list[tuple[Tensor, int]]:
    """Pair each of the student's layers with a teacher's; the first with the first, the last with the last."""
    last = max(1, len(mine) - 1)
    return [(state, round(place * (len(theirs) - 1) / last)) for place, state in enumerate(mine)]


def _listed(output: Any, name: str) -> tuple[Tensor, ...]:
    found = getattr(output, name, None) or getattr(output, f"decoder_{name}", None)
    if not found or not all(isinstance(tensor, Tensor) for tensor in found):
        raise TransformError(f"the model gives no {name} to learn from")
    return tuple(found)


def _look_eagerly(module: nn.Module | None) -> None:
    """Let a model compute its attention so that it can be seen; other ways never make the matrix."""
    change = getattr(module, "set_attn_implementation", None)
    if not callable(change):
        raise TransformError(f"{type(module).__name__} cannot show where it looks; attention: 0")
    if getattr(module.config, "_attn_implementation", None) != "eager":  # type: ignore[union-attr]
        change("eager")
