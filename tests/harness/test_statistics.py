"""The laws of ratios and verdicts: nothing is found where nothing is, a true difference is found, and the sides are never mixed up."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optkit.core.measurement import Array, Measurement, Metric, Samples
from optkit.harness import statistics
from optkit.harness.statistics import NOISE_LIMIT, Ratio, compare, compare_exact, floor_of, noise_verdict, ratio, verdict

TRIALS = 400
TPOT = Metric("tpot_ms", "ms", False, lambda c: np.median(c["gaps_ms"].reshape(len(c["gaps_ms"]), -1), axis=-1), lambda c: c["gaps_ms"])
RATE = Metric("rate", "items/s", True, lambda c: 1e3 / c["gaps_ms"].mean((-1, -2)), lambda c: 1e3 / c["gaps_ms"])
MEAN = Metric("score", "", True, lambda c: c["score"].mean(-1), lambda c: c["score"])
positive = arrays.arrays(np.float64, st.integers(2, 12), elements=st.floats(0.01, 100))


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 200)


def trial(seed: int, slower: float = 1.0, rounds: int = 12, blocks: int = 4) -> tuple[Samples, Samples, Samples]:
    """Return baseline, other and baseline-again as a machine with moods would give them.

    A slow wave goes through all arms alike, each process has luck of its own, each block is a little off, and some are disturbed.
    """
    draw = np.random.default_rng(seed)
    wave = np.zeros(rounds * blocks * 3)
    for i in range(1, len(wave)):
        wave[i] = 0.95 * wave[i - 1] + draw.normal(0, 0.008)
    waves = wave.reshape(rounds, blocks, 3)
    arms = []
    for number, factor in enumerate((1.0, slower, 1.0)):
        luck = draw.normal(0, 0.003)
        own = draw.normal(0, 0.015, (rounds, blocks)) + (draw.random((rounds, blocks)) < 0.03) * draw.exponential(0.5, (rounds, blocks))
        arms.append({"gaps_ms": 10 * factor * np.exp(waves[:, :, number] + luck + own)})
    return arms[0], arms[1], arms[2]


def said(metric: Metric, slower: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in range(TRIALS):
        before, after, again = trial(seed, slower)
        counts[compare("x", metric, before, after, ratio(metric, before, again)).verdict] += 1
    return counts


@pytest.mark.parametrize("metric", [TPOT, RATE], ids=lambda metric: metric.name)
def test_the_baseline_against_itself_is_hardly_ever_better_or_worse(metric: Metric) -> None:
    counts = said(metric, slower=1.0)
    assert counts["better"] + counts["worse"] <= 0.08 * TRIALS
    assert counts["same"] >= 0.5 * TRIALS


def test_a_slow_down_of_five_percent_is_found_in_nine_of_ten_trials() -> None:
    counts = said(TPOT, slower=1.05)
    assert counts["worse"] >= 0.9 * TRIALS
    assert counts["better"] == 0


def test_a_rate_that_falls_is_worse_and_one_that_rises_is_better() -> None:
    falls, rises = said(RATE, slower=1.5), said(RATE, slower=0.7)
    assert falls["worse"] >= 0.85 * TRIALS
    assert rises["better"] >= 0.85 * TRIALS
    assert falls["better"] == rises["worse"] == 0


def test_the_interval_covers_the_true_ratio_about_95_times_in_100() -> None:
    draw = np.random.default_rng(5)
    hits = 0
    for _ in range(TRIALS):
        common = draw.normal(0, 0.2, 24)
        before, after = ({"score": 10 * level * np.exp(common + draw.normal(0, 0.05, 24))} for level in (1.0, 1.1))
        found = ratio(MEAN, before, after)
        assert found is not None
        hits += found.low <= 1.1 <= found.high
    assert 0.91 <= hits / TRIALS <= 0.985


def test_what_disturbs_both_arms_alike_cancels() -> None:
    common = np.exp(np.random.default_rng(0).normal(0, 0.5, 30))
    paired = ratio(MEAN, {"score": common}, {"score": 1.1 * common})
    assert paired is not None
    assert paired.half_width < 1e-12
    assert math.exp(paired.log) == pytest.approx(1.1)


@given(positive, st.floats(0.2, 5), st.integers(0, 5))
def test_swapping_the_arms_turns_the_ratio_round(values: Array, factor: float, seed: int) -> None:
    other = values * factor * np.exp(np.random.default_rng(seed).normal(0, 0.1, len(values)))
    there, back = ratio(MEAN, {"score": values}, {"score": other}), ratio(MEAN, {"score": other}, {"score": values})
    assert there is not None
    assert back is not None
    assert there.log == pytest.approx(-back.log)
    assert there.half_width == pytest.approx(back.half_width)
    assert (there.before, there.after) == (back.after, back.before)


@given(st.floats(-3, 3), st.floats(0, 3), st.floats(0, 1), st.booleans())
def test_a_verdict_is_never_on_the_wrong_side(log: float, half_width: float, floor: float, higher_is_better: bool) -> None:
    given_verdict = verdict(Ratio(1.0, math.exp(log), log, half_width), higher_is_better, floor)
    improved = (log > 0) is higher_is_better and log != 0
    assert given_verdict != ("worse" if improved else "better")
    if abs(log) <= half_width or abs(log) <= floor:
        assert given_verdict in ("same", "unclear")
    if given_verdict == "same":
        assert max(floor, half_width) <= math.log1p(NOISE_LIMIT)


@given(positive, positive, st.booleans())
def test_better_is_never_said_of_samples_that_are_all_worse(before: Array, rise: Array, higher_is_better: bool) -> None:
    count = min(len(before), len(rise))
    metric = Metric("score", "", higher_is_better, MEAN.estimate, MEAN.each)
    found = compare("x", metric, {"score": before[:count]}, {"score": before[:count] + rise[:count]})
    assert found.verdict != ("worse" if higher_is_better else "better")
    assert found.ratio is not None
    assert found.ratio > 1


def test_shares_below_the_margin_are_the_same() -> None:
    before = np.linspace(1, 2, 20)
    worse = {"score": before * 0.9995}
    assert compare("x", MEAN, {"score": before}, worse).verdict == "worse"
    assert compare("x", MEAN, {"score": before}, worse, margin=0.001).verdict == "same"
    assert compare("x", MEAN, {"score": before}, {"score": before * 0.998}, margin=0.001).verdict == "worse"


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(None, "same"), (Ratio(1, 1, 0.02, 0.05), "same"), (Ratio(1, 1, 0.02, 0.2), "unclear"), (Ratio(1, 1, -0.2, 0.01), "unclear")],
)
def test_noise_is_quiet_or_unclear_but_never_better_or_worse(noise: Ratio | None, expected: str) -> None:
    assert noise_verdict(noise) == expected


def test_the_floor_is_how_far_the_baseline_is_from_itself_or_could_be() -> None:
    assert floor_of(None) == 0
    assert floor_of(Ratio(1, 1, -0.04, 0.01)) == 0.04
    assert floor_of(Ratio(1, 1, 0.01, 0.05)) == 0.05


@pytest.mark.parametrize(
    ("log", "half_width", "floor", "expected"),
    [
        (0.05, 0.01, 0.0, "worse"),
        (-0.05, 0.01, 0.0, "better"),
        (0.05, 0.01, 0.045, "unclear"),
        (0.05, 0.01, 0.06, "same"),
        (0.01, 0.02, 0.0, "same"),
        (0.0, 0.2, 0.0, "unclear"),
        (0.05, 0.01, 0.2, "unclear"),
        (0.9, 0.1, 0.2, "worse"),
        (0.0, 0.0, 0.0, "same"),
        (0.1, math.inf, 0.0, "unclear"),
    ],
)
def test_the_verdict_of_a_time_follows_from_ratio_interval_and_floor(log: float, half_width: float, floor: float, expected: str) -> None:
    assert verdict(Ratio(1, math.exp(log), log, half_width), False, floor) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(0, 0, "same"), (0, 1, "unclear"), (1, 0, "unclear"), (math.nan, 1, "unclear"), (-1, -1, "same")]
)
def test_values_without_a_ratio_are_compared_without_one(before: float, after: float, expected: str) -> None:
    found = compare("x", MEAN, {"score": np.full(4, before)}, {"score": np.full(4, after)})
    assert (found.ratio, found.low, found.high, found.verdict) == (None, None, None, expected)


def test_one_cluster_alone_has_a_ratio_without_limits() -> None:
    found = ratio(MEAN, {"score": np.array([2.0])}, {"score": np.array([1.0])})
    assert found is not None
    assert (found.low, found.high) == (0.0, math.inf)
    assert compare("x", MEAN, {"score": np.array([2.0])}, {"score": np.array([1.0])}).verdict == "unclear"


def test_a_value_that_vanishes_in_some_draws_leaves_the_interval_open() -> None:
    rare = np.array([0.0] * 5 + [1.0])
    found = ratio(MEAN, {"score": rare}, {"score": rare + np.array([0, 0, 0, 0, 0, 0.5])})
    assert found is not None
    assert math.isinf(found.half_width)


def test_columns_that_one_arm_alone_has_are_left_out() -> None:
    values = np.linspace(1, 2, 8)
    found = ratio(MEAN, {"score": values, "kept": np.ones(3)}, {"score": 2 * values, "greedy": np.ones(16)})
    assert found is not None
    assert math.exp(found.log) == pytest.approx(2)


def test_the_same_samples_give_the_same_interval_again() -> None:
    before, after, _ = trial(3)
    assert ratio(TPOT, before, after) == ratio(TPOT, before, after)


def count(value: float, higher_is_better: bool = False) -> Measurement:
    return Measurement("artefact_bytes", "bytes", value, (value,), higher_is_better)


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "expected"),
    [(100, 100, 0.0, "same"), (100, 99, 0.0, "better"), (100, 101, 0.0, "worse"), (100, 101, 0.02, "same"), (100, 150, 0.02, "worse")],
)
def test_counted_numbers_differ_beyond_their_tolerance(before: float, after: float, tolerance: float, expected: str) -> None:
    found = compare_exact("x", count(before), count(after), tolerance)
    assert found.verdict == expected
    assert found.ratio == pytest.approx(after / before)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high


def test_counted_numbers_that_are_zero_have_no_ratio() -> None:
    assert compare_exact("x", count(0), count(0)).verdict == "same"
    assert compare_exact("x", count(0), count(1)).verdict == "unclear"
    assert compare_exact("x", count(1), count(0)).ratio is None


def test_a_measurement_keeps_value_samples_and_direction() -> None:
    found = statistics.measure(MEAN, {"score": np.array([1.0, 3.0])})
    assert (found.value, found.samples, found.higher_is_better) == (2.0, (1.0, 3.0), True)
