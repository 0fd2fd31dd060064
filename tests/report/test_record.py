from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from optkit.core.errors import ArtefactError
from optkit.core.measurement import Comparison, Measurement
from optkit.report.record import SCHEMA, Compared, Metric, Report


def test_a_report_comes_back_from_its_json_unchanged(make_report, tmp_path):
    made = make_report()
    (tmp_path / "report.json").write_text(made.to_json())
    assert Report.load(tmp_path) == made
    assert Report.load(tmp_path / "report.json").to_json() == made.to_json()


def test_json_has_the_keys_of_the_contract(make_report):
    document = json.loads(make_report().to_json())
    assert document["schema"] == SCHEMA
    assert set(document) == {"schema", "run", "environment", "model", "data", "arms", "comparisons", "noise", "limits", "scaling", "notes"}
    assert set(document["run"]) == {"id", "name", "started", "seconds", "quick", "recipe_sha256", "stopped_because", "command"}
    optimized = document["arms"]["optimized"]
    assert set(optimized) == {"label", "history", "execution", "opens_in", "dtype", "ranks", "notes", "metrics"}
    assert set(optimized["history"][0]) == {"name", "settings", "execution", "opens_in"}
    assert set(optimized["metrics"]["tpot_ms"]) == {"value", "unit", "samples", "higher_is_better", "detail"}
    assert set(document["comparisons"][0]) == {"arm", "metric", "before", "after", "ratio", "low", "high", "verdict"}
    assert set(document["limits"][0]) == {"metric", "limit", "ratio", "held"}


def test_a_report_fits_its_json_schema_and_a_wrong_one_does_not(make_report):
    jsonschema = pytest.importorskip("jsonschema")
    document, schema = json.loads(make_report().to_json()), Report.model_json_schema(mode="serialization")
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"surprise": 1}, schema)


def test_a_measurement_that_is_not_finite_becomes_null_and_is_counted():
    taken = Measurement("perplexity", "perplexity", math.inf, (3.0, math.nan, math.inf), higher_is_better=False, detail={"window": 512})
    entry = Metric.of(taken)
    assert entry.value is None
    assert entry.samples == (3.0,)
    assert entry.detail == {"window": 512, "not_finite": 2}


def test_a_comparison_with_an_infinite_ratio_becomes_null():
    entry = Compared.of(Comparison("optimized", "perplexity", 3.0, math.inf, math.inf, None, math.inf, "worse"))
    assert (entry.before, entry.after, entry.ratio, entry.low, entry.high) == (3.0, None, None, None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_settings_refuse_what_json_cannot_say(make_report, value):
    with pytest.raises(ValidationError):
        make_report(environment={"deep": [{"value": value}]})


def test_text_that_utf8_cannot_hold_is_written_escaped(make_report):
    made = make_report(environment={"cpu": "broken \udcff"})
    assert "broken \\udcff" in json.loads(made.to_json())["environment"]["cpu"]


def test_a_report_without_baseline_is_refused(make_report):
    made = make_report()
    with pytest.raises(ValidationError, match="baseline"):
        make_report(arms={"optimized": made.arms["optimized"]}, comparisons=())


def test_a_comparison_of_an_arm_that_is_not_there_is_refused(make_report):
    made = make_report()
    with pytest.raises(ValidationError, match="optimized"):
        make_report(arms={"baseline": made.arms["baseline"]})


@pytest.mark.parametrize("started", ["yesterday", "2026-05-04T13:45:00", "2026-05-04T13:45:00+02:00"])
def test_a_start_that_is_no_utc_time_is_refused(make_report, started):
    run = make_report().run
    with pytest.raises(ValidationError, match=r"UTC|expected a time"):
        type(run)(**{**run.model_dump(), "started": started})


def test_a_newer_schema_is_refused_with_its_number(make_report, tmp_path):
    document = json.loads(make_report().to_json()) | {"schema": SCHEMA + 1, "future": True}
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=f"schema {SCHEMA + 1}"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"schema": "1"}', '{"schema": true}', '{"schema": 0}', '{"schema": 1}', "\x00", "[" * 100_000],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"report\.json"):
        Report.load(tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ArtefactError, match="missing"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("run", "seconds"), "long", r"run\.seconds"),
        (("run", "seconds"), math.nan, r"run\.seconds"),
        (("arms", "baseline", "execution"), "imagined", r"arms\.baseline\.execution"),
        (("arms", "baseline", "metrics", "tpot_ms", "samples"), ["1"], r"tpot_ms\.samples\.0"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(make_report, tmp_path, path: tuple[str, ...], value: Any, told: str):
    document = json.loads(make_report().to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=told):
        Report.load(tmp_path)


def test_held_says_whether_every_limit_held(make_report):
    made = make_report()
    assert not made.held
    assert make_report(limits=made.limits[:1]).held
    assert make_report(limits=()).held
