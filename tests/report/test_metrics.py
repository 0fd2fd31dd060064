from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.report.metrics import family_of, in_order, interval, number, scale_of, spread, title_of


def test_metrics_stand_in_a_fixed_order_with_batch_sizes_after_their_base():
    mixed = ["zeta", "artefact_bytes", "tpot_ms@16", "perplexity", "accuracy", "tpot_ms@8", "ttft_ms", "tpot_ms", "tpot_ms"]
    assert in_order(mixed) == ["ttft_ms", "tpot_ms", "tpot_ms@8", "tpot_ms@16", "perplexity", "artefact_bytes", "accuracy", "zeta"]


@pytest.mark.parametrize(
    ("metric", "unit", "family"),
    [
        ("tpot_ms@8", "ms", "timing"),
        ("roof_share", "share", "timing"),
        ("perplexity", "perplexity", "quality"),
        ("kl_divergence", "nats", "fidelity"),
        ("artefact_bytes", "bytes", "size"),
        ("item_ms", "ms", "timing"),
        ("images_per_second", "images/s", "timing"),
        ("disk", "bytes", "size"),
        ("mean_absolute_error", "degrees", "quality"),
        ("name@host", "", "quality"),
    ],
)
def test_a_metric_belongs_to_a_family(metric, unit, family):
    assert family_of(metric, unit) == family


def test_a_row_takes_one_unit_from_its_largest_value():
    scale = scale_of("bytes", [5.7e7, 8.8e5, None])
    assert scale.unit == "MB"
    assert number(8.8e5 * scale.factor) == "0.8800"
    assert scale_of("bytes/s", [2.1e10]).unit == "GB/s"
    assert scale_of("share", [0.5]).unit == "%"


def test_a_title_does_not_repeat_what_the_name_says():
    assert title_of("tpot_ms@8", scale_of("ms", [1.0])) == "tpot_ms@8"
    assert title_of("tokens_per_second", scale_of("tokens/s", [1.0])) == "tokens_per_second"
    assert title_of("peak_memory_bytes", scale_of("bytes", [6e8])) == "peak_memory_bytes (MB)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (0.0, "0"), (3.14159, "3.142"), (12345.6, "12,346"), (0.01234, "0.01234"), (1e-6, "1e-06")],
)
def test_a_number_has_four_significant_digits(value, text):
    assert number(value) == text


@given(st.floats(min_value=1e-4, max_value=1e6))
def test_a_written_number_is_within_a_thousandth(value):
    assert math.isclose(float(number(value).replace(",", "")), value, rel_tol=1e-3)


def test_an_interval_has_the_digits_that_it_deserves():
    assert interval(0.5213, 0.5098, 0.5312) == "0.52 [0.51, 0.53]"
    assert interval(1.00312, 1.00294, 1.00335) == "1.0031 [1.0029, 1.0033]"
    assert interval(0.155, 0.155, 0.155) == "0.155"
    assert interval(None, None, None) == "-"


def test_a_ratio_that_is_not_one_is_not_written_as_one():
    assert float(interval(1.0004)) != 1


def test_spread_is_the_farthest_end_from_one():
    assert spread(1.001, 0.98, 1.01) == "±2 %"
    assert spread(None, None, None) == "-"
