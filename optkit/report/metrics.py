"""What the report knows of metrics: their order, their family and how their numbers are written. It never changes a recorded number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from optkit.report.text import plain

Family = Literal["timing", "quality", "fidelity", "size"]

TIMING = ("ttft_ms", "tpot_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "tokens_per_second")
QUALITY = ("perplexity", "bits_per_byte", "token_accuracy")
FIDELITY = ("kl_divergence", "top1_agreement", "greedy_match")
SIZE = ("peak_memory_bytes", "peak_rank_memory_bytes", "artefact_bytes", "weight_bytes_per_token", "cache_bytes")
ORDER = (*TIMING, *QUALITY, *FIDELITY, *SIZE, "read_bandwidth", "roof_share", "communication_share")
HIGHER_IS_BETTER = ("tokens_per_second", "token_accuracy", "top1_agreement", "greedy_match", "read_bandwidth", "roof_share")

_RATES = ("read_bandwidth", "roof_share", "communication_share")
_SHARES = ("share", "ratio", "fraction", "1")
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """The unit that a row is written in: ``shown = value * factor``, followed by ``unit``."""

    factor: float
    unit: str


def base_of(metric: str) -> tuple[str, int]:
    """Return the metric's name without its batch size, and the batch size: ``tpot_ms@8`` gives ``("tpot_ms", 8)``."""
    name, mark, batch = metric.rpartition("@")
    return (name, int(batch)) if mark and batch.isascii() and batch.isdecimal() else (metric, 1)


def in_order(metrics: Iterable[str]) -> list[str]:
    """Return the metrics without repeats in the fixed order of tables; batch sizes follow their base, unknown names come last."""
    return sorted(set(metrics), key=_rank)


def family_of(metric: str, unit: str = "") -> Family:
    """Return what a metric is about. An unknown one goes by its unit: time is timing, bytes are size, the rest is the task's quality."""
    name, _ = base_of(metric)
    if name in FIDELITY:
        return "fidelity"
    if name in SIZE or (name not in ORDER and unit in ("bytes", "B")):
        return "size"
    if name in TIMING or name in _RATES or (name not in ORDER and (unit in ("ms", "s", "us") or unit.endswith("/s"))):
        return "timing"
    return "quality"


def scale_of(unit: str, values: Iterable[float | None]) -> Scale:
    """Return a readable unit for all values of one row, chosen by the largest of them."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if unit in _SHARES:
        return Scale(100.0, "%")
    if unit in ("bytes", "B", "bytes/s", "B/s"):
        step, letter = next(((step, letter) for step, letter in _STEPS if largest >= step), (1.0, ""))
        return Scale(1 / step, f"{letter}B" + ("/s" if unit.endswith("/s") else ""))
    return Scale(1.0, plain(unit, 24))


def title_of(metric: str, scale: Scale) -> str:
    """Return the metric's name with its unit, unless the name says it already."""
    name, _ = base_of(metric)
    told = (
        name == scale.unit
        or name.endswith(f"_{scale.unit}")
        or (scale.unit == "tokens/s" and name == "tokens_per_second")
        or not scale.unit
    )
    return plain(metric, 60) if told else f"{plain(metric, 60)} ({scale.unit})"


def number(value: float | None) -> str:
    """Return a number with four significant digits, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:.3g}"
    decimals = 0 if size >= 1000 else 3 if size == 0 else min(6, 3 - math.floor(math.log10(size)))
    text = f"{value:,.{max(0, decimals)}f}"
    return "0" if size == 0 else text


def interval(ratio: float | None, low: float | None = None, high: float | None = None) -> str:
    """Return a ratio with its interval, such as ``0.52 [0.51, 0.53]``, with the digits that the interval deserves."""
    if ratio is None or not math.isfinite(ratio):
        return "-"
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return _fixed(ratio, _decimals(ratio, 0.005))
    decimals = _decimals(ratio, high - low)
    return f"{_fixed(ratio, decimals)} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def spread(ratio: float | None, low: float | None, high: float | None) -> str:
    """Return how far a ratio that should be 1 may lie off it, such as ``±0.9 %``."""
    ends = [abs(end - 1) for end in (ratio, low, high) if end is not None and math.isfinite(end)]
    if not ends:
        return "-"
    return f"±{max(ends) * 100:.2g} %" if max(ends) < 1 else "more than ±100 %"


def _decimals(ratio: float, width: float) -> int:
    needed = 2
    while needed < 5 and (width < 2 * 10**-needed or (ratio != 1 and round(ratio, needed) in (0, 1))):
        needed += 1
    return needed


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{max(0, decimals)}f}"


def _rank(metric: str) -> tuple[int, str, int]:
    name, batch = base_of(metric)
    return (ORDER.index(name), "", batch) if name in ORDER else (len(ORDER), name, batch)
