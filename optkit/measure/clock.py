"""Where the time of a forward goes: a clock that is handed from module to module, so that the shares add up to the whole.

At every entry into a module of a known stage, and at every exit, what has passed since the last one goes to the stage that was running.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
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

    ``events`` counts entries and exits by stage: each costs ``event_cost_s``, which the one who reads the clock takes off.
    """

    def __init__(self, module: nn.Module) -> None:
        self._stages = stages_of(module)
        self._module = module
        self._marks: list[Any] = []  # in turn a stage that is entered, or None where one is left, and the moment
        self.seconds: dict[tuple[str, int | None], float] = {}
        self.events: dict[str, int] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the module's forwards; the clock runs from here to the end."""
        self.seconds, self.events = {}, {}
        watched = []
        for name, stage in self._stages.items():
            layer = self._module.get_submodule(name)
            watched.append((layer, layer.__dict__.get("forward")))
            layer.forward = _watched(layer.forward, (stage, block_of(name)), self._marks)  # a hook would send the call a longer way
        self.begin()
        try:
            yield
        finally:
            end = time.perf_counter()
            for layer, own in watched:
                del layer.forward
                if own is not None:
                    layer.forward = own
            self._read(end)

    def begin(self) -> None:
        """Forget what has passed so far."""
        self._marks.clear()
        self._start = time.perf_counter()

    def by_stage(self) -> dict[str, float]:
        """Return the seconds of each stage, of all blocks together."""
        found: dict[str, float] = {}
        for (stage, _), seconds in self.seconds.items():
            found[stage] = found.get(stage, 0.0) + seconds
        return found

    def _read(self, end: float) -> None:
        """Give what has passed between two marks to the stage that was running."""
        running: list[tuple[str, int | None]] = [(FRAMEWORK, None)]
        last = self._start
        for entered, now in zip(self._marks[::2], self._marks[1::2], strict=True):
            key = running[-1]
            self.seconds[key] = self.seconds.get(key, 0.0) + now - last
            self.events[key[0]] = self.events.get(key[0], 0) + 1
            last = now
            if entered is None:
                running.pop()
            else:
                running.append(entered)
        self.seconds[running[0]] = self.seconds.get(running[0], 0.0) + end - last


def _watched(forward: Callable[..., Any], key: tuple[str, int | None], marks: list[Any]) -> Callable[..., Any]:
    add, clock = marks.append, time.perf_counter

    def call(*args: Any, **named: Any) -> Any:
        add(key)
        add(clock())
        output = forward(*args, **named)
        add(None)
        add(clock())
        return output

    return update_wrapper(call, forward)


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


def event_cost_s(repeats: int = 2000) -> float:
    """Return what one entry or exit costs: half the difference of calling a module that does nothing, with and without the clock."""
    module = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    layer, nothing = module[1], nn.Identity()
    layer.forward = nothing.forward

    def calls_s() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            layer(None)
        return time.perf_counter() - start

    plain = median(calls_s() for _ in range(5))
    with StageClock(module).running():
        watched = median(calls_s() for _ in range(5))
    return max(0.0, watched - plain) / repeats / 2


def _output_head(module: Any) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) else None
