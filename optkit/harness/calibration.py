"""What transforms look at: the task's calibration data; random tokens for a model whose quality is withheld anyway."""

from __future__ import annotations

import torch

from optkit.core.subject import Calibration, Subject
from optkit.tasks import Task

_BATCHES, _TOGETHER, _WINDOW = 2, 4, 512


def calibration_for(subject: Subject, task: Task, seed: int, items: int) -> tuple[Calibration | None, str]:
    """Return ``items`` windows of data, fewer of random tokens, or None where there can be none; and what is to be told about it."""
    withheld = task.withheld(subject)
    if withheld is None:
        return task.calibration(subject, items), ""
    config = getattr(subject.module, "config", None)
    known, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if subject.kind != "causal-lm" or not isinstance(known, int):
        return None, ""
    window = min(_WINDOW, longest) if isinstance(longest, int) else _WINDOW
    ids = torch.randint(0, known, (_BATCHES * _TOGETHER, window), generator=torch.Generator().manual_seed(seed))
    told = f"calibrated on {ids.numel()} random tokens, as quality is withheld ({withheld}): speed and memory alone mean something"
    return Calibration(tuple({"input_ids": rows} for rows in ids.split(_TOGETHER))), told
