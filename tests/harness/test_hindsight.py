"""Plans are held against the last run on this kind of processor, and what they could not know is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optkit.core.environment import environment
from optkit.harness.hindsight import set_beside
from optkit.report.plan import PlannedStep, PlanReport


def step(name: str, tpot_ms: float | None, **more: Any) -> PlannedStep:
    return PlannedStep(name, "float32" if tpot_ms else None, 1, 1, 1, 1, 1, tpot_ms, tpot_ms, None, **more)


def plan(recipe: str, before: float | None, after: float | None, **more: Any) -> PlanReport:
    return PlanReport(recipe, 2, 1, (step("baseline", before), step("int8", after, **more)), ())


def run(folder: Path, number: str, ratio: float, cpu: str | None = None) -> None:
    place = folder / number
    place.mkdir(parents=True)
    entry = {
        "arm": "optimized",
        "metric": "tpot_ms",
        "before": 10.0,
        "after": 10 * ratio,
        "ratio": ratio,
        "low": 0.9 * ratio,
        "high": 1.1 * ratio,
    }
    facts = {"cpu": cpu or environment()["cpu"], "device": "cpu"}
    (place / "report.json").write_text(json.dumps({"environment": facts, "comparisons": [entry, {**entry, "arm": "float32"}]}))


def test_the_last_run_here_counts_and_its_interval_is_forgiven(tmp_path: Path) -> None:
    run(tmp_path / "int8", "0001", 0.9)
    run(tmp_path / "int8", "0002", 0.5)
    run(tmp_path / "int8", "0003", 0.1, cpu="another")
    found = set_beside([plan("int8", 8, 4.2), plan("int8", 8, 6), plan("new", 8, 4)], tmp_path)
    assert found.without == ("new",)
    near, far = found.rows
    assert near.ratio == 0.5 and near.planned_ratio == pytest.approx(0.525) and near.off == 0
    assert far.off == pytest.approx(0.5)
    assert "Within 25%: 1 of 2 that have a law; 0 have none." in found.to_markdown() and "Not run there: new." in found.to_markdown()
    assert json.loads(found.to_json())["rows"][1]["off"] == pytest.approx(0.5)


def test_where_there_is_no_law_the_reason_stands(tmp_path: Path) -> None:
    run(tmp_path / "nf4", "0001", 0.5)
    (row,) = set_beside([plan("nf4", 8, None, unlawful="layers of Bits4Linear")], tmp_path).rows
    assert row.off is None and row.why == "no law for layers of Bits4Linear"
    (row,) = set_beside([plan("nf4", 8, 8, warnings=("no gain expected",))], tmp_path).rows
    assert row.why == "no gain expected"
