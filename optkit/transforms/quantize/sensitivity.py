"""How far a model's answers move when weights are rounded: KL divergence of its distributions, or the relative error of other outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.tracing import answer_of, evaluating

_WORK = 3e12  # multiplications and additions that all runs together may take, about
_FEWEST, _MOST = 64, 4096  # tokens
_ANSWER_BYTES = 256 * 2**20


class Probe:
    """The answers of a module as it is now, on a little calibration data. ``distance`` compares later answers with them.

    Args:
        module: what to watch.
        data: calibration data, of which evenly spread rows are taken.
        runs: how often the module will be run: the more often, and the larger it is, the fewer rows.

    Raises:
        TransformError: an answer is not finite.
    """

    def __init__(self, module: nn.Module, data: Calibration, runs: int) -> None:
        self._module = module
        work = 2 * sum(parameter.numel() for parameter in module.parameters()) * runs
        vocabulary = getattr(getattr(module, "config", None), "vocab_size", 1)
        most = min(_MOST, _ANSWER_BYTES // (4 * vocabulary) if isinstance(vocabulary, int) else _MOST)
        self._batches = few_rows(data.batches, int(max(_FEWEST, min(most, _WORK / work))))
        self._are_logits = self._has_logits()
        self._answers = [self._answer(batch) for batch in self._batches]
        if not all(bool(torch.isfinite(answer).all()) for answer in self._answers):
            raise TransformError("the model's answers on calibration data hold NaN or infinity before anything is rounded")

    def distance(self) -> float:
        """Return the mean over positions of KL(before || now) in nats; for answers that are no logits ||now - before||^2 / ||before||^2."""
        total = weight = 0.0
        for batch, before in zip(self._batches, self._answers, strict=True):
            now = self._answer(batch)
            if self._are_logits:
                total += float((before.exp() * (before - now)).sum())
                weight += before.numel() / before.shape[-1]
            else:
                total += float((now - before).square().sum())
                weight += float(before.square().sum())
        return total / weight if weight else total

    @torch.no_grad()
    def _answer(self, batch: Mapping[str, Tensor]) -> Tensor:
        with evaluating(self._module):
            answer = answer_of(self._module, batch).float()
        return answer.log_softmax(-1) if self._are_logits else answer

    @torch.no_grad()
    def _has_logits(self) -> bool:
        with evaluating(self._module):
            output = self._module(**self._batches[0])
        return isinstance(output, Mapping) and "logits" in output


def few_rows(batches: tuple[Mapping[str, Tensor], ...], tokens: int) -> list[dict[str, Tensor]]:
    """Return evenly spread rows of the batches that hold about this many tokens (rows, where they are no token ids), at least one row.

    A row of token ids that is longer than that by itself is cut.
    """
    places = [(index, row) for index, batch in enumerate(batches) for row in range(len(next(iter(batch.values()))))]
    first = next(iter(batches[0].values()))
    length = 1 if first.is_floating_point() or first.dim() < 2 else first.shape[1]
    count = max(1, min(len(places), tokens // length))
    chosen = [places[round(step * (len(places) - 1) / max(1, count - 1))] for step in range(count)]
    kept = [{name: tensor[row : row + 1] for name, tensor in batches[index].items()} for index, row in chosen]
    if set(batches[0]) == {"input_ids"}:
        return [{"input_ids": row["input_ids"][:, :tokens]} for row in kept]
    return kept
