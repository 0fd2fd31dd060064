"""How long a forward takes, from what it computes and reads: a law with physical terms, fitted to measurements of one machine.

    t = forward + calls x module + sum over linear layers of max(bytes / bandwidth, operations / rate(rows)) + scores / score_rate
        + cached bytes / cache_bandwidth,    rate(rows) = peak x rows / (rows + half_rows)

The maximum is smooth (a norm of order 4), as both go on at once near the corner; see Williams et al. 2009 ("Roofline",
https://doi.org/10.1145/1498765.1498785) for the two roofs. A single row only reads: products of a matrix with a vector have kernels of
their own, while those of matrices first bring the weights into an order of theirs, which costs as much as ``half_rows`` rows. The
bandwidth goes from that of small models, which a processor's cache may hold, to that of large ones; it is half way, by its logarithm, at
``turning_bytes`` of weights. For a prompt the scores are quadratic in its length, for a later token linear in what stands before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARAMETERS = (
    "forward_s",
    "module_s",
    "bandwidth",
    "small_bandwidth",
    "turning_bytes",
    "peak",
    "half_rows",
    "score_rate",
    "cache_bandwidth",
)
_UNITS = {
    "forward_s": "s",
    "module_s": "s",
    "half_rows": "rows",
    "bandwidth": "B/s",
    "small_bandwidth": "B/s",
    "turning_bytes": "B",
    "cache_bandwidth": "B/s",
    "peak": "FLOP/s",
    "score_rate": "FLOP/s",
}
_START = (1e-4, 2e-5, 2e10, 2e10, 5e7, 1e11, 8.0, 2e10, 1e10)
_LEAST, _MOST = (1e-7, 1e-8, 1e8, 1e8, 4e6, 1e8, 1e-2, 1e7, 1e8), (1.0, 0.01, 1e13, 1e13, 1e9, 1e15, 300.0, 1e15, 1e14)
_ORDER = 4
_DRAWS = 40
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What one forward must do: modules that it calls, and their work.

    ``rows`` are those of the layers within blocks, ``head_rows`` those of the output head.
    """

    calls: int
    rows: int
    linear_flops: float
    linear_bytes: float
    head_rows: int
    head_flops: float
    head_bytes: float
    score_flops: float
    cache_bytes: float


@dataclass(frozen=True)
class Point:
    """A measured forward: of which model, prompt and batch, which phase, what it had to do, and the seconds it took."""

    model: str
    parameters: int
    prompt: int
    batch: int
    phase: str
    load: Load
    seconds: float


@dataclass(frozen=True)
class Law:
    """The parameters, in SI units, and for each the ends of its 95 % interval."""

    parameters: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]

    def seconds(self, load: Load) -> float:
        """Return how long a forward of this load takes."""
        return float(_predict(np.array([self.parameters[name] for name in PARAMETERS]), _columns([load]))[0])

    def terms(self, load: Load) -> dict[str, float]:
        """Return the seconds of each term; those of both roofs of the linear layers are told, of which about the larger counts."""
        parts = _parts(np.array([self.parameters[name] for name in PARAMETERS]), _columns([load]))
        return {name: float(seconds[0]) for name, seconds in parts.items()}

    def regime(self, load: Load) -> str:
        """Return the term that takes longest."""
        terms = self.terms(load)
        return max(terms, key=lambda name: terms[name])

    def plain(self) -> dict[str, Any]:
        """Return the law as plain data, with units."""
        return {name: {"value": self.parameters[name], "unit": _UNITS[name], "interval": list(self.intervals[name])} for name in PARAMETERS}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Law:
        """Return the law that ``plain`` has told."""
        ends = {name: (plain[name]["interval"][0], plain[name]["interval"][1]) for name in PARAMETERS}
        return cls({name: plain[name]["value"] for name in PARAMETERS}, ends)


def fit(points: Sequence[Point], seed: int = 0, draws: int = _DRAWS) -> Law:
    """Return the law that comes nearest to the points, by the logarithm of the error, with intervals from drawing points anew.

    Without ``draws`` the intervals are the values alone.

    Raises:
        ValueError: there are fewer points than parameters.
    """
    if len(points) < len(PARAMETERS):
        raise ValueError(f"{len(points)} points cannot tell {len(PARAMETERS)} parameters")
    columns, taken = _columns([point.load for point in points]), np.array([point.seconds for point in points])
    best = _solve(columns, taken, np.log(_START))
    draw = np.random.default_rng(seed)
    drawn = [best]
    for _ in range(draws):
        rows = draw.integers(0, len(points), len(points))
        drawn.append(_solve(columns[rows], taken[rows], best))
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0)
    values = dict(zip(PARAMETERS, np.exp(best).tolist(), strict=True))
    ends = zip(np.exp(np.minimum(low, best)).tolist(), np.exp(np.maximum(high, best)).tolist(), strict=True)
    return Law(values, dict(zip(PARAMETERS, ends, strict=True)))


def errors(law: Law, points: Sequence[Point]) -> Floats:
    """Return |predicted / measured - 1| of each point."""
    return np.array([abs(law.seconds(point.load) / point.seconds - 1) for point in points])


def _solve(columns: Floats, taken: Floats, start: Floats) -> Floats:
    from scipy.optimize import least_squares

    def off(logs: Floats) -> Floats:
        return np.log(_predict(np.exp(logs), columns) / taken)

    bounds = np.log(_LEAST), np.log(_MOST)
    found = least_squares(off, np.clip(start, *bounds), bounds=bounds, loss="soft_l1", f_scale=0.1, max_nfev=400)
    return np.asarray(found.x, dtype=np.float64)


def _columns(loads: Sequence[Load]) -> Floats:
    return np.array([list(asdict(load).values()) for load in loads], dtype=np.float64)


def _predict(p: Floats, columns: Floats) -> Floats:
    inner, head = _linear(p, columns)
    overhead, attention = _rest(p, columns)
    roofed = [np.asarray(sum(part**_ORDER for part in parts) ** (1 / _ORDER)) for parts in (inner, head)]
    return np.asarray(overhead + attention + sum(roofed))


def _parts(p: Floats, columns: Floats) -> dict[str, Floats]:
    (read, multiplied), (head_read, head_multiplied) = _linear(p, columns)
    overhead, attention = _rest(p, columns)
    return {"overhead": overhead, "reading weights": read + head_read, "products": multiplied + head_multiplied, "attention": attention}


def _linear(p: Floats, columns: Floats) -> list[tuple[Floats, Floats]]:
    """Return the seconds of reading and of multiplying, of the layers within blocks and of the head."""
    _, _, bandwidth, small_bandwidth, turning, peak, half, _, _ = p
    _, rows, flops, read, head_rows, head_flops, head_read, _, _ = columns.T
    small = 1 / (1 + ((read + head_read) / turning) ** 2)
    here = bandwidth * (small_bandwidth / bandwidth) ** small
    both = (rows, flops, read), (head_rows, head_flops, head_read)
    return [(many / here, np.where(rows > 1, work * (rows + half) / (peak * np.maximum(rows, 1)), 0.0)) for rows, work, many in both]


def _rest(p: Floats, columns: Floats) -> tuple[Floats, Floats]:
    """Return the seconds of the overhead, and of scores with keys and values."""
    forward, module, *_, score_rate, cache_bandwidth = p
    calls, *_, scores, cached = columns.T
    return forward + calls * module, scores / score_rate + cached / cache_bandwidth
