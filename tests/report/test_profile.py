"""Profiles and laws as they are written: a contract in JSON, tables, and pictures with named axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optkit.measure.law import PARAMETERS, Law, Load, Point
from optkit.report.law import KindOfLaw, LawReport, write_law
from optkit.report.profile import ArmProfile, ProfileReport, write_profile

FACTS = {"cpu": "a processor", "threads": 2}


def stage(ms: float, flops: float = 1e6, read: float = 4e6) -> dict[str, Any]:
    return {"ms": ms, "flops": flops, "bytes": read, "cycles": ms * 2e6, "blocks_ms": [ms]}


@pytest.fixture
def profile() -> ProfileReport:
    phase = {"total_ms": 3.0, "sum_ms": 2.9, "watched_ms": 3.3, "stages": {"feed-forward": stage(2.0), "framework": stage(0.9, 0, 0)}}
    told = {"phases": {"prefill": phase, "decode": phase}, "ticks_per_second": 2e9, "read_bytes_per_second": 1e10}
    found = told | {"peak_flops": {"float32": 1e11}, "counted": {"core_cycles": 5e6}, "unavailable": {"energy": "no counters"}}
    arm = ArmProfile.of("baseline", {"engine": None, "dtype": "float32", "parameters": 1000}, found)
    return ProfileReport("own", "reference", {"prompt_tokens": 8}, FACTS, (arm,))


def test_a_profile_in_json_has_phases_with_stages(profile: ProfileReport) -> None:
    found = json.loads(profile.to_json())["arms"][0]["phases"]
    assert set(found) == {"prefill", "decode"} and found["decode"]["total_ms"] == 3.0
    assert {"ms", "flops", "bytes", "cycles"} < set(found["decode"]["stages"]["feed-forward"])


def test_a_profile_in_markdown_has_the_sum_and_what_could_not_be_read(profile: ProfileReport, tmp_path: Path) -> None:
    write_profile(profile, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "baseline, a whole request: core cycles 5,000,000" in text
    assert "unavailable: energy: no counters" in text and "the untouched whole 3.000 ms (-3.3%)" in text and "69%" in text
    picture = (tmp_path / "stages.svg").read_text()
    assert "share of the time, %" in picture and "feed-forward" in picture and "baseline, decode" in picture


def test_a_law_is_written_with_its_errors_regimes_and_pictures(tmp_path: Path) -> None:
    values = dict(zip(PARAMETERS, (1e-4, 1e-6, 1e10, 1e10, 5e7, 1e11, 8.0, 1e11, 1e10), strict=True))
    law = Law(values, {name: (value / 2, value * 2) for name, value in values.items()})
    points = []
    for size in (5, 20):
        for phase, rows in (("prefill", 64), ("decode", 1)):
            load = Load(4, rows, 2e6 * size * rows, 4e6 * size, 1, 1e5, 1e5, 1e4, 1e4)
            points.append(Point(f"m{size}", size * 1_000_000, 64, 1, phase, load, law.seconds(load) * 1.1))
    report = LawReport(FACTS, (KindOfLaw("float32", law, tuple(points), ("m20 prompt 2048 batch 16",), 1, 0.04, 0.1),))
    write_law(report, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "reading weights" in text and "10.00 [5.000, 20.00]" in text and "4.0%" in text and "m5" in text
    assert "P: million parameters" in (tmp_path / "float32.svg").read_text()
    found = json.loads(report.to_json())["kinds"][0]
    assert found["law"]["bandwidth"]["unit"] == "B/s" and found["points"][0]["predicted_seconds"] == pytest.approx(
        law.seconds(points[0].load)
    )
