"""Holds the parts of a model to the answers of the whole, in one process, before it is served by several.

So an architecture with something that a plan has overlooked is refused, and never answers wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import ArmError, TransformError
from optkit.core.mesh import Mesh
from optkit.engines.parallel.cut import part_of
from optkit.engines.parallel.part import Part
from optkit.kernels.packed import PackedLayer

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the logits' norm; a mistake gives about 1
_LOW_TOLERANCE, _LIMIT_S = 0.05, 60.0


class ThreadPeers:
    """Peers that are threads of one process."""

    waited_s = 0.0

    def __init__(self, rank: int, barrier: Barrier, desk: list[Tensor]) -> None:
        self.rank, self.size = rank, len(desk)
        self._barrier, self._desk = barrier, desk

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of everyone's tensor."""
        self._desk[self.rank] = tensor.float()
        try:
            self._barrier.wait(_LIMIT_S)
            total = sum(self._desk[1:], self._desk[0])
            self._barrier.wait(_LIMIT_S)
        except BrokenBarrierError:
            raise ArmError("another shard has failed") from None
        return total.to(tensor.dtype)


def rehearse(module: Any, mesh: Mesh, stages: Sequence[int] = ()) -> float:
    """Compare the parts' answers on a few tokens with those of the whole; return by what share of the norm they are off.

    All parts are in memory at once, beside the whole.

    Raises:
        TransformError: they differ by more than rounding does.
    """
    ids = torch.arange(12)[None] * 7919 % int(module.config.vocab_size)
    with torch.inference_mode():
        expected = module.eval()(input_ids=ids, use_cache=False).logits.float()
    answer = answer_of_parts(module, mesh, ids, stages).float()
    off = float((answer - expected).norm() / expected.norm().clamp_min(1e-30))
    packed = any(isinstance(layer, PackedLayer) for layer in module.modules())  # some kernels round their inputs
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), torch.float32)
    if not off <= (_LOW_TOLERANCE if packed else _TOLERANCE.get(dtype, _LOW_TOLERANCE)):
        raise TransformError(
            f"{type(module).__name__} answers otherwise in {mesh.size} parts than as a whole (by {off:.2g} of the norm): something in it "
            "is shared that its plan does not tell; use data_parallel"
        )
    return off


def answer_of_parts(module: nn.Module, mesh: Mesh, ids: Tensor, stages: Sequence[int] = ()) -> Tensor:
    """Return the logits (b, t, v) of ids (b, t), by all parts of one replica in turn."""
    given = {"input_ids": ids}
    for stage in range(mesh.pipeline):
        given = {"inputs_embeds": _answer_of_stage(module, mesh, stage, given, tuple(stages))}
    return given["inputs_embeds"]


def _answer_of_stage(module: nn.Module, mesh: Mesh, stage: int, given: dict[str, Tensor], stages: tuple[int, ...]) -> Tensor:
    barrier, desk = Barrier(mesh.tensor), [torch.empty(0)] * mesh.tensor

    def work(rank: int) -> Tensor:
        place = mesh.place(stage * mesh.tensor + rank)
        try:
            shard = part_of(module, Part(mesh, place, ThreadPeers(rank, barrier, desk), stages=stages))
            with torch.inference_mode():
                found: Tensor = shard(**given, use_cache=False).logits
        except BaseException:
            barrier.abort()
            raise
        return found

    with ThreadPoolExecutor(mesh.tensor) as pool:
        return list(pool.map(work, range(mesh.tensor)))[-1]
