"""Where the time of a forward goes: a clock that is handed from module to module, so that the shares add up to the whole.

At every entry into a module of a known stage, and at every exit, what has passed since the last one goes to the stage that was running.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

EMBEDDING, NORMS, PROJECTIONS, SCORES = "embedding", "norms", "attention projections", "attention scores"
FEED_FORWARD, HEAD, RECURRENT, FRAMEWORK = "feed-forward", "output head", "recurrent layers", "framework"
STAGES = (EMBEDDING, PROJECTIONS, SCORES, FEED_FORWARD, RECURRENT, NORMS, HEAD)
_ATTENTION, _FEED_FORWARD = re.compile(r"Attention|Attn"), re.compile(r"MLP|Mlp|FeedForward|FFN|DenseReluDense|Intermediate|LayerFF")
_NORM, _ROTATION = re.compile(r"Norm"), re.compile(r"Rotary|RotaryEmbedding|RelativePosition")
_BLOCK = re.compile(r"\.(\d+)(?:\.|$)")


class StageClock:
    """Seconds by stage and block of the forwards while it is running; what belongs to no stage is the framework's.

    ``events`` counts entries and exits by stage: each has its cost, see ``event_costs_s``, which the one who reads the clock takes off.

    Args:
        module: whose forwards are watched.
        twice: read the time twice at every entry and exit, so that the difference tells what a reading costs where it stands.
    """

    def __init__(self, module: nn.Module, twice: bool = False) -> None:
        self._stages = stages_of(module)
        self._module = module
        self._twice = twice
        self.seconds: dict[tuple[str, int | None], float] = {}
        self.events: dict[str, int] = {}
        self._running: list[tuple[str, int | None]] = []
        self._last = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the module's forwards; the clock runs from here to the end."""
        handles = []
        for name, stage in self._stages.items():
            layer = self._module.get_submodule(name)
            key = stage, block_of(name)
            if self._twice:
                handles.append(layer.register_forward_pre_hook(lambda *_: self._tick()))
                handles.append(layer.register_forward_hook(lambda *_: self._tick()))
            handles.append(layer.register_forward_pre_hook(lambda *_, key=key: self._enter(key)))
            handles.append(layer.register_forward_hook(lambda *_: self._leave()))
        self._running = [(FRAMEWORK, None)]
        self._last = time.perf_counter()
        try:
            yield
        finally:
            self._tick()
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """Forget what has passed so far."""
        self.seconds, self.events = {}, {}
        self._last = time.perf_counter()

    def by_stage(self) -> dict[str, float]:
        """Return the seconds of each stage, of all blocks together."""
        found: dict[str, float] = {}
        for (stage, _), seconds in self.seconds.items():
            found[stage] = found.get(stage, 0.0) + seconds
        return found

    def _enter(self, key: tuple[str, int | None]) -> None:
        self._tick()
        self._running.append(key)

    def _leave(self) -> None:
        self._tick()
        self._running.pop()

    def _tick(self) -> None:
        now = time.perf_counter()
        key = self._running[-1]
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self._last
        self.events[key[0]] = self.events.get(key[0], 0) + 1
        self._last = now


def stages_of(module: nn.Module) -> dict[str, str]:
    """Return the stage of each module that has one, by dotted name.

    Within attention, linear layers are projections and the rest are scores, with the cache and the rotation; other linear layers, and what
    stands between them in a feed-forward layer, are feed-forward.
    """
    head = _output_head(module)
    found: dict[str, str] = {}
    attention: list[str] = []
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        within = any(name.startswith(f"{outer}.") for outer in attention)
        stage = None
        if not name:
            continue
        if layer is head:
            stage = HEAD
        elif isinstance(layer, nn.Embedding):
            stage = EMBEDDING
        elif _NORM.search(kind):
            stage = NORMS
        elif isinstance(layer, nn.Linear | Conv1D):
            stage = PROJECTIONS if within else FEED_FORWARD
        elif isinstance(layer, nn.RNNBase):
            stage = RECURRENT
        elif _ATTENTION.search(kind):
            attention.append(name)
            stage = SCORES
        elif _ROTATION.search(kind):
            stage = SCORES
        elif _FEED_FORWARD.search(kind):
            stage = FEED_FORWARD
        if stage is not None:
            found[name] = stage
    return found


def block_of(name: str) -> int | None:
    """Return the number of the block that a module stands in, or None."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def event_costs_s(repeats: int = 2000) -> tuple[float, float]:
    """Return what one entry or exit costs where nothing else is done, and what a second reading of the time there adds to it."""
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].forward = lambda x: x

    def calls_s() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            module[0](None)
        return time.perf_counter() - start

    plain = median(calls_s() for _ in range(5))
    with StageClock(module).running():
        once = median(calls_s() for _ in range(5))
    with StageClock(module, twice=True).running():
        twice = median(calls_s() for _ in range(5))
    return max(0.0, once - plain) / repeats / 2, max(0.0, twice - once) / repeats / 2


def _output_head(module: Any) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) else None
