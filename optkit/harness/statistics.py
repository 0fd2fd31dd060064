"""From samples to a ratio with an interval, and from an interval to a verdict. Both arms are always resampled together, in pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from optkit.core.measurement import Array, Comparison, Measurement, Metric, Samples, Verdict

DRAWS = 1000
CONFIDENCE = 0.95
NOISE_LIMIT = 0.10  # noise beyond this share makes every difference within it unclear
_CHUNK = 100


@dataclass(frozen=True)
class Ratio:
    """after/before as a logarithm, with half the width of its 95 % interval. A half-width of 0 means that nothing was drawn."""

    before: float
    after: float
    log: float
    half_width: float

    @property
    def low(self) -> float:
        """The lower end of the interval of the ratio."""
        return math.exp(self.log - self.half_width)

    @property
    def high(self) -> float:
        """The upper end of the interval of the ratio."""
        return math.exp(self.log + self.half_width)


def measure(metric: Metric, columns: Samples) -> Measurement:
    """Return the metric's value over all samples, and the samples themselves."""
    value = float(metric.estimate({name: column[None] for name, column in columns.items()})[0])
    return Measurement(metric.name, metric.unit, value, tuple(float(x) for x in metric.each(columns)), metric.higher_is_better)


def ratio(metric: Metric, before: Samples, after: Samples, seed: int = 0) -> Ratio | None:
    """Return after/before of one metric with a paired bootstrap interval over clusters, or None where a value is not positive.

    The same clusters are drawn for both arms, so what disturbed both cancels (Kalibera and Jones 2013, "Rigorous benchmarking in
    reasonable time"). The interval is the bootstrap's standard error times Student's t, for the number of clusters. Only columns that
    both arms have are used. Where more than one drawn value in twenty vanishes, the interval has no end.
    """
    shared = before.keys() & after.keys()
    before, after = ({name: side[name] for name in sorted(shared)} for side in (before, after))
    count = min(len(column) for column in before.values())
    value_before, value_after = (float(metric.estimate({k: c[None] for k, c in side.items()})[0]) for side in (before, after))
    if not (value_before > 0 and value_after > 0 and math.isfinite(value_before * value_after)):
        return None
    log = math.log(value_after / value_before)
    if count < 2:
        return Ratio(value_before, value_after, log, math.inf)
    draw = np.random.default_rng(seed)
    logs: list[Array] = []
    for _ in range(0, DRAWS, _CHUNK):
        picks = {length: draw.integers(0, length, (_CHUNK, length)) for length in sorted({len(column) for column in before.values()})}
        sides = [metric.estimate({name: column[picks[len(column)]] for name, column in side.items()}) for side in (before, after)]
        with np.errstate(divide="ignore", invalid="ignore"):
            logs.append(np.log(sides[1] / sides[0]))
    spread = np.concatenate(logs)
    finite = np.isfinite(spread)
    if finite.mean() < CONFIDENCE:
        return Ratio(value_before, value_after, log, math.inf)
    error = float(np.std(spread[finite])) * math.sqrt(count / (count - 1))
    return Ratio(value_before, value_after, log, error * float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)))


def interval(metric: Metric, columns: Samples, seed: int = 0) -> tuple[float, float, float]:
    """Return one metric's value with its bootstrap interval over clusters: value, low, high."""
    value = measure(metric, columns).value
    draw = np.random.default_rng(seed)
    found: list[Array] = []
    for _ in range(0, DRAWS, _CHUNK):
        picks = {length: draw.integers(0, length, (_CHUNK, length)) for length in sorted({len(column) for column in columns.values()})}
        found.append(metric.estimate({name: column[picks[len(column)]] for name, column in columns.items()}))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(np.concatenate(found), [tail, 100 - tail])
    return value, float(low), float(high)


def floor_of(noise: Ratio | None) -> float:
    """Return the noise floor as a logarithm: how far the baseline is from itself, or could be by its interval.

    The larger of both, not their sum: a difference must clear the floor with its whole interval, and the same disturbance would
    count three times. Simulated with processes that differ by 0.5 %, this finds a true 5 % in nine of ten trials; the sum, in seven.
    """
    return 0.0 if noise is None else max(abs(noise.log), noise.half_width)


def verdict(found: Ratio, higher_is_better: bool, floor: float) -> Verdict:
    """Say what a ratio means.

    ``better`` or ``worse`` needs the whole interval beyond the noise floor. Within the floor it is ``same``; where the noise or the
    interval is wider than the limit, or the interval touches both sides, it is ``unclear``.
    """
    nearest = abs(found.log) - found.half_width
    if nearest > floor:
        return "better" if (found.log > 0) is higher_is_better else "worse"
    if max(floor, found.half_width) > math.log1p(NOISE_LIMIT):
        return "unclear"
    return "same" if abs(found.log) <= max(floor, found.half_width) else "unclear"


def noise_verdict(noise: Ratio | None) -> Verdict:
    """Say whether the baseline against itself is quiet enough to judge by: ``same``, or ``unclear`` beyond the limit."""
    return "unclear" if floor_of(noise) > math.log1p(NOISE_LIMIT) else "same"


def compare(arm: str, metric: Metric, before: Samples, after: Samples, noise: Ratio | None = None, margin: float = 0.0) -> Comparison:
    """Return the comparison of one sampled metric between the baseline and an arm; shares below ``margin`` count as noise."""
    found = ratio(metric, before, after)
    if found is None:
        values = [measure(metric, side).value for side in (before, after)]
        return Comparison(arm, metric.name, values[0], values[1], None, None, None, "same" if values[0] == values[1] else "unclear")
    said = verdict(found, metric.higher_is_better, max(floor_of(noise), math.log1p(margin)))
    return Comparison(arm, metric.name, found.before, found.after, found.after / found.before, found.low, found.high, said)


def compare_exact(arm: str, before: Measurement, after: Measurement, tolerance: float = 0.0) -> Comparison:
    """Return the comparison of a number that is counted, not sampled: its interval is the tolerance, as a share."""
    if not (before.value > 0 and after.value > 0):
        said: Verdict = "same" if before.value == after.value else "unclear"
        return Comparison(arm, before.metric, before.value, after.value, None, None, None, said)
    found = Ratio(before.value, after.value, math.log(after.value / before.value), math.log1p(tolerance))
    said = "same" if abs(found.log) <= found.half_width else verdict(found, before.higher_is_better, 0.0)
    return Comparison(arm, before.metric, before.value, after.value, after.value / before.value, found.low, found.high, said)
