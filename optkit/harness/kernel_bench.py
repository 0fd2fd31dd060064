"""The kernel bench: packed layers beside PyTorch's own and beside the memory itself, in turns, on many layers one after another.

For one token the question is the share of the read bandwidth, because every weight is read once. For many tokens it is the time against
a bfloat16 product, because the arithmetic decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.measurement import Array, Metric
from optkit.harness import statistics
from optkit.kernels.int4 import GROUP_SIZES, Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.report.bench import Line

ROOF, BFLOAT16 = "read sweep", "bfloat16 linear"
FEW_TOKENS = 16
_TIME = Metric("ms", "ms", False, lambda c: np.median(c["ms"], axis=-1), lambda c: c["ms"])
_MIN_ROUNDS = 7
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Case:
    """What is timed: all layers once, on an input of so many tokens."""

    rows: int = 5632
    cols: int = 2048
    weights: int = 700_000_000
    tokens: int = 1

    @property
    def layers(self) -> int:
        """How many layers of this size make up the weights; for many tokens an eighth of them, because the arithmetic decides."""
        return max(1, self.weights // (self.rows * self.cols) // (1 if self.tokens <= FEW_TOKENS else 8))


@dataclass(frozen=True)
class _Contender:
    name: str
    weight_bytes: int
    run: Callable[[], object]


def bench_kernels(
    case: Case, seconds: float = 20.0, threads: int | None = None, seed: int = 0, progress: Progress = lambda doing, share: None
) -> list[Line]:
    """Time all contenders in random order, none twice in a row, until the time is spent; return one line each, the reference first.

    For up to 16 tokens the reference is a sweep that only reads as many bytes, scaled to the contender's own; beyond, a bfloat16 product.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads or torch.get_num_threads())
    contenders = list(_contenders(case, progress))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start, number = time.perf_counter(), 0
    draw = np.random.default_rng(seed)
    last = -1
    while number < _MIN_ROUNDS or time.perf_counter() - start < seconds:
        order = draw.permutation(len(contenders))
        if order[0] == last:
            order = order[::-1]
        last = int(order[-1])
        for index in order:
            began = time.perf_counter()
            contenders[index].run()
            times[contenders[index].name].append(1e3 * (time.perf_counter() - began))
        number += 1
        progress(f"timing {case.tokens} tokens: round {number}", min(1.0, (time.perf_counter() - start) / seconds))
    return _lines(case, contenders, {name: np.array(found) for name, found in times.items()})


def _lines(case: Case, contenders: list[_Contender], times: dict[str, Array]) -> list[Line]:
    few = case.tokens <= FEW_TOKENS
    against = next(one for one in contenders if one.name == (ROOF if few else BFLOAT16))
    lines = []
    for one in contenders:
        if one.name == ROOF and not few:
            continue
        scale = one.weight_bytes / against.weight_bytes if few else 1.0
        found = None if one is against else statistics.ratio(_TIME, {"ms": times[against.name] * scale}, {"ms": times[one.name]})
        ms = float(np.median(times[one.name]))
        bounds = (None, None, None) if found is None else (float(np.exp(found.log)), found.low, found.high)
        lines.append(Line(one.name, case.tokens, ms, one.weight_bytes, one.weight_bytes / ms * 1e3, against.name, *bounds))
    return sorted(lines, key=lambda line: line.kernel != against.name)


def _contenders(case: Case, progress: Progress) -> Iterator[_Contender]:
    x = torch.randn(case.tokens, case.cols, dtype=torch.bfloat16)
    if case.tokens <= FEW_TOKENS:
        buffer = torch.ones(case.layers * case.rows * case.cols // 4, dtype=torch.int32)
        yield _Contender(ROOF, buffer.nbytes, lambda: buffer.max())
    for kind in _KINDS:
        progress(f"making the weights of {kind.name}", None)
        yield _sweep(kind, [kind.make(case.rows, case.cols) for _ in range(case.layers)], x.float() if kind.wide else x)


def _sweep(kind: _Kind, layers: list[Any], x: Tensor) -> _Contender:
    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            kind.multiply(x, layer)

    run()  # packed layers take the layout of their kernels at the first call
    return _Contender(kind.name, sum(kind.bytes_of(layer) for layer in layers), run)


@dataclass(frozen=True)
class _Kind:
    """A format: how a layer (rows, cols) is made of random numbers, what one token reads of it, and how it multiplies."""

    name: str
    make: Callable[[int, int], Any]
    multiply: Callable[[Tensor, Any], Tensor]
    bytes_of: Callable[[Any], int]
    wide: bool = False


def _packed(x: Tensor, layer: nn.Module) -> Tensor:
    found: Tensor = layer(x)
    return found


def _int8(rows: int, cols: int) -> Int8Linear:
    return Int8Linear((_numbers(rows, cols, -127, 128, torch.int8), torch.rand(rows)), None, (cols, rows), torch.bfloat16)


def _w8a8(rows: int, cols: int) -> W8A8Linear:
    return W8A8Linear((_numbers(rows, cols, -127, 128, torch.int8), torch.rand(rows)), None, torch.bfloat16)


@cache
def _numbers_of(x: Tensor) -> Tensor:
    return x.to(torch.int8)


def _int4(group_size: int) -> Callable[[int, int], Int4Linear]:
    def make(rows: int, cols: int) -> Int4Linear:
        scale, point = (torch.rand(rows, cols // group_size).bfloat16() for _ in range(2))
        return Int4Linear((_numbers(rows, cols // 2, 0, 256, torch.uint8), scale, point), None, group_size, torch.bfloat16)

    return make


def _aten_int4(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_numbers(rows, cols, 0, 16, torch.int32), 1)
    return packed, torch.rand(cols // 64, rows, 2).bfloat16()


def _numbers(rows: int, cols: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, (rows, cols), dtype=dtype)


def _tensor_bytes(tensors: Tensor | tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in ((tensors,) if isinstance(tensors, Tensor) else tensors))


_KINDS = (
    _Kind(BFLOAT16, lambda rows, cols: torch.randn(rows, cols, dtype=torch.bfloat16), functional.linear, _tensor_bytes),
    _Kind("float32 linear", lambda rows, cols: torch.randn(rows, cols), functional.linear, _tensor_bytes, wide=True),
    _Kind("int8", _int8, _packed, lambda layer: layer.weight_bytes),
    _Kind("int8 by int8", _w8a8, _packed, lambda layer: layer.weight_bytes),
    *(_Kind(f"int4 g{size}", _int4(size), _packed, lambda layer: layer.weight_bytes) for size in GROUP_SIZES),
    _Kind(
        "PyTorch _int_mm, rounding left out",
        lambda rows, cols: _numbers(rows, cols, -127, 128, torch.int8),
        lambda x, weight: torch._int_mm(_numbers_of(x), weight.T),
        _tensor_bytes,
    ),
    _Kind(
        "PyTorch _weight_int8pack_mm",
        lambda rows, cols: (_numbers(rows, cols, -127, 128, torch.int8), torch.rand(rows).bfloat16()),
        lambda x, layer: torch.ops.aten._weight_int8pack_mm(x, *layer),
        _tensor_bytes,
    ),
    _Kind(
        "PyTorch _weight_int4pack_mm g64",
        _aten_int4,
        lambda x, layer: torch.ops.aten._weight_int4pack_mm_for_cpu(x, layer[0], 64, layer[1]),
        _tensor_bytes,
    ),
)
