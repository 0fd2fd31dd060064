"""Stages of about equal time, from the measured time of each block, of what stands before them and of what follows."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from optkit.engines.eager import EagerEngine
from optkit.engines.parallel.stages import block_list

_PROMPT, _STEPS = 4, 8


class Times(NamedTuple):
    """Seconds of one step: before the first block, of each block, and after the last."""

    before: float
    blocks: tuple[float, ...]
    after: float


@torch.inference_mode()
def step_times(module: Any, rows: int = 32) -> Times:
    """Return the times of a step of one token for each of so many sequences: of each part its usual share of a step, times the usual step.

    What slows a whole step down for a while leaves the shares as they are, and what strikes one part is no usual share.
    Stages pay where batches are large, and there products count, not the reading of weights.

    Blocks of equal shape take equal time, so that one value is given for all of them: a cut must not follow what differs by chance.
    """
    _, listed = block_list(module)
    marks: list[float] = []
    handles = [listed[0].register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))]
    handles += [block.register_forward_hook(lambda *_: marks.append(time.perf_counter())) for block in listed]
    engine, steps = EagerEngine(module), []
    vocabulary = int(module.config.vocab_size)
    try:
        tokens = engine.prefill(torch.arange(rows * _PROMPT).view(rows, _PROMPT) % vocabulary).argmax(-1)
        for _ in range(_STEPS):
            marks.clear()
            start = time.perf_counter()
            tokens = engine.step(tokens).argmax(-1)
            edges = [start, *marks, time.perf_counter()]
            steps.append([end - begin for begin, end in pairwise(edges)])
    finally:
        for handle in handles:
            handle.remove()
    first, *blocks, last = usual(steps)
    return Times(first, shared([_shape(block) for block in listed], blocks), last)


def usual(steps: Sequence[Sequence[float]]) -> list[float]:
    """Return for each part of a step the median of its shares of the steps, times the median of the steps."""
    whole = median(sum(step) for step in steps)
    shares = zip(*([part / sum(step) for part in step] for step in steps), strict=True)
    return [whole * median(share) for share in shares]


def shared(shapes: Sequence[Hashable], times: Sequence[float]) -> tuple[float, ...]:
    """Return the median of the times of all blocks that have the same shape, for each block."""
    together: dict[Hashable, list[float]] = {}
    for shape, seconds in zip(shapes, times, strict=True):
        together.setdefault(shape, []).append(seconds)
    return tuple(median(together[shape]) for shape in shapes)


def _shape(block: nn.Module) -> Hashable:
    """Return what the time of a block depends on: the shapes and dtypes of its parameters and buffers, packed weights among them."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in block.state_dict().items() if isinstance(tensor, torch.Tensor))


def balanced(times: Times, stages: int) -> tuple[int, ...]:
    """Return how many blocks each stage has, so that the slowest stage is as fast as can be.

    The law: of all cuts into consecutive stages of at least one block, one with the least maximum; found by dynamic programming.
    """
    depth = len(times.blocks)
    sums = [0.0]
    for each in times.blocks:
        sums.append(sums[-1] + each)

    def cost(stage: int, start: int, end: int) -> float:
        ends = (times.before if stage == 0 else 0.0) + (times.after if stage == stages - 1 else 0.0)
        return sums[end] - sums[start] + ends

    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for stage in range(stages):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (so_far, counts) in best[-1].items():
            for end in range(start + 1, depth - (stages - stage - 1) + 1):
                worst = max(so_far, cost(stage, start, end))
                if end not in found or worst < found[end][0]:
                    found[end] = (worst, (*counts, end - start))
        best.append(found)
    return best[-1][depth][1]
