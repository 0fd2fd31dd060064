"""A law with physical terms: it finds the numbers that made the times, and predicts what it has not seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optkit.measure.law import PARAMETERS, Law, Load, Point, errors, fit

TRUE = dict(zip(PARAMETERS, (2e-4, 3e-6, 2e10, 6e10, 5e7, 1.5e11, 6.0, 4e10, 1.5e10), strict=True))
LAW = Law(TRUE, {name: (value, value) for name, value in TRUE.items()})


def load(blocks: int, weights: float, rows: int, batch: int, pairs: float, cached: float) -> Load:
    return Load(11 * blocks, rows, 2 * weights * rows, 4 * weights, batch, 2e6 * batch, 4e6, 4e3 * blocks * pairs, cached)


def points(noise: float = 0.0) -> list[Point]:
    draw = np.random.default_rng(1)
    found = []
    for blocks, weights in ((4, 3e5), (4, 3e6), (8, 2e7), (16, 1e8), (22, 1e9)):
        for prompt in (16, 128, 1024):
            for batch in (1, 4, 16):
                first = load(blocks, weights, prompt * batch, batch, batch * prompt**2 / 2, 0.0)
                later = load(blocks, weights, batch, batch, 0.0, 512.0 * blocks * prompt * batch)
                for phase, each in (("prefill", first), ("decode", later)):
                    seconds = LAW.seconds(each) * math.exp(noise * draw.standard_normal())
                    found.append(Point(f"{blocks}", int(weights), prompt, batch, phase, each, seconds))
    return found


def test_exact_times_give_back_the_parameters() -> None:
    found = fit(points())
    for name, value in TRUE.items():
        assert found.parameters[name] == pytest.approx(value, rel=0.05), name
    assert errors(found, points()).max() < 0.01


def test_points_that_the_fit_has_not_seen_are_predicted_and_intervals_hold_the_truth() -> None:
    noisy = points(noise=0.05)
    found = fit(noisy[::2])
    assert float(np.median(errors(found, noisy[1::2]))) < 0.1
    inside = [low <= TRUE[name] <= high for name, (low, high) in found.intervals.items()]
    assert sum(inside) >= len(inside) - 2 and all(low <= high for low, high in found.intervals.values())


def test_the_regime_is_what_takes_longest() -> None:
    small = load(4, 1e4, 1, 1, 0, 0)
    assert LAW.regime(small) == "overhead"
    assert LAW.regime(load(22, 1e9, 1, 1, 0, 0)) == "reading weights"
    assert LAW.regime(load(22, 1e9, 4096, 1, 0, 0)) == "products"
    assert LAW.regime(load(4, 1e4, 1, 1, 0, 1e9)) == "attention"
    assert LAW.terms(small)["overhead"] == pytest.approx(2e-4 + 44 * 3e-6)


def test_a_law_survives_being_written_down() -> None:
    assert Law.of(LAW.plain()) == LAW


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="8 points cannot tell 9 parameters"):
        fit(points()[:8])
