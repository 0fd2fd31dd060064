from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from optkit.cli.compare import compare
from optkit.core.errors import ArtefactError, OptkitError
from optkit.report.compare import (
    UnlikeError,
    compare_table,
    frame_of,
    load_reports,
    pareto_front,
    print_comparison,
    to_csv,
    to_html,
    to_json,
    to_markdown,
)
from optkit.report.runs import COLUMNS


@pytest.fixture
def runs(make_report) -> list:
    """Four runs: fast and slightly worse, slower and nearly equal, beaten in both, and simulated."""
    return [
        make_report(name="int4", run_id="0001", factor=0.52, perplexity=1.02),
        make_report(name="int8", run_id="0002", factor=0.70, perplexity=1.001, steps=("int8",)),
        make_report(name="drop", run_id="0003", factor=0.75, perplexity=1.30, steps=("drop_layers", "int8")),
        make_report(name="mask", run_id="0004", factor=0.30, perplexity=1.0, steps=("magnitude",), execution="simulated"),
    ]


@pytest.fixture
def experiments(runs, finish, tmp_path) -> Path:
    """The four runs, sealed, below a root of experiments."""
    for report in runs:
        finish(tmp_path, report)
    return tmp_path


def test_every_run_and_arm_is_a_row_with_declared_types(experiments):
    frame = load_reports(experiments)
    assert len(frame) == 4 * 4
    for column, kind in COLUMNS.items():
        assert frame[column].dtype == kind, column
    assert frame["tpot_ms"].dtype == "float64"
    assert frame["tpot_ms_verdict"].dtype == "str"
    row = frame[(frame["run"] == "0003") & (frame["arm"] == "optimized")].iloc[0]
    assert row["transforms"] == "drop_layers > int8"
    assert row["tpot_ms"] == pytest.approx(15.0)
    assert row["tpot_ms_ratio"] == pytest.approx(0.75)
    assert row["tpot_ms_low"] < 0.75 < row["tpot_ms_high"]
    assert row["tpot_ms_verdict"] == "better"
    assert row["torch"] == "2.13.0"


def test_a_baseline_has_no_ratio(experiments):
    frame = load_reports(experiments)
    assert frame.loc[frame["arm"] == "baseline", "tpot_ms_ratio"].isna().all()


def test_runs_recipes_and_roots_can_be_given_and_none_counts_twice(experiments):
    whole = load_reports(experiments)
    parts = load_reports([str(experiments / "int4" / "0001"), experiments / "int8", experiments / "int4" / "0001" / "report.json"])
    assert list(dict.fromkeys(parts["recipe"])) == ["int4", "int8"]
    assert len(load_reports([experiments, experiments / "int4"])) == len(whole)


def test_an_unfinished_run_is_named_and_not_counted(experiments):
    (experiments / "int4" / "0001" / "manifest.json").unlink()
    frame = load_reports(experiments)
    assert "int4" not in set(frame["recipe"])
    assert any("int4/0001" in note and "not finished" in note for note in frame.attrs["notes"])


def test_a_recipe_whose_name_is_a_number_is_searched(make_report, finish, tmp_path):
    finish(tmp_path, make_report(name="2024"))
    assert set(load_reports(tmp_path)["recipe"]) == {"2024"}


def test_a_run_that_has_only_begun_is_named(make_report, finish, tmp_path):
    finish(tmp_path, make_report())
    begun = tmp_path / "int4" / "0002"
    begun.mkdir()
    (begun / "stage.json").write_text("{}")
    assert any("int4/0002" in note for note in load_reports(tmp_path).attrs["notes"])


def test_an_unfinished_run_named_directly_is_refused(experiments):
    (experiments / "int4" / "0001" / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match="not finished"):
        load_reports(experiments / "int4" / "0001")


def test_a_report_changed_after_the_run_is_not_counted(experiments):
    file = experiments / "int4" / "0001" / "report.json"
    file.write_text(file.read_text().replace("0.52", "0.42"))
    assert any("was changed" in note for note in load_reports(experiments).attrs["notes"])


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": {}}'])
def test_a_damaged_manifest_is_named(experiments, manifest):
    (experiments / "int4" / "0001" / "manifest.json").write_text(manifest)
    assert any("int4/0001" in note for note in load_reports(experiments).attrs["notes"])


def test_a_place_without_runs_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no finished run"):
        load_reports(tmp_path)
    with pytest.raises(ArtefactError, match="no folder of runs"):
        load_reports(tmp_path / "absent")


def test_the_comparison_has_one_baseline_the_fastest_first_and_simulated_speed_last(runs):
    table = compare_table(frame_of(runs))
    assert list(table["recipe"]) == ["(baseline)", "int4", "int8", "drop", "mask"]
    assert table.loc[0, "tpot_ms_ratio"] == 1
    assert table.loc[0, "tpot_ms"] == 20.0


def test_the_front_holds_what_nothing_real_beats(runs):
    table = compare_table(frame_of(runs)).set_index("recipe")
    assert table["pareto"].to_dict() == {"(baseline)": True, "mask": False, "int4": True, "int8": True, "drop": False}


def test_the_front_turns_where_higher_quality_is_better():
    table = pd.DataFrame({"execution": "real", "t_ratio": [1.0, 0.5, 0.6], "q_ratio": [1.0, 0.9, 0.8]})
    assert list(pareto_front(table, "t", "q", higher_is_better=True)) == [True, True, False]
    assert list(pareto_front(table, "t", "q", higher_is_better=False)) == [False, True, True]


def test_equal_rows_are_both_on_the_front_and_a_missing_number_is_not():
    table = pd.DataFrame({"execution": "real", "t_ratio": [0.5, 0.5, math.nan], "q_ratio": [1.0, 1.0, 0.1]})
    assert list(pareto_front(table, "t", "q")) == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"machine": {"cpu": "Other 1"}}, "processor"),
        ({"machine": {"cores": 64}}, "cores"),
        ({"machine": {"threads": 1}}, "threads"),
        ({"machine": {"memory_bytes": 64 * 2**30}}, "memory"),
        ({"machine": {"device": "cuda"}}, "device"),
        ({"data_sha": "e" * 64}, "data"),
        ({"data": None}, "task"),
        ({"sha": "c" * 64}, "model weights"),
    ],
)
def test_unlike_runs_are_refused_with_what_differs_unless_told(runs, make_report, changes, told):
    frame = frame_of([*runs, make_report(name="far", run_id="0009", **changes)])
    with pytest.raises(UnlikeError, match=rf"(?s){told}: .*0009"):
        compare_table(frame)
    table = compare_table(frame, anyway=True)
    assert "far" in set(table["recipe"])
    assert any(note.startswith(f"unlike: {told}") for note in table.attrs["notes"])


def test_a_baseline_of_another_dtype_is_unlike(runs, make_report):
    far = make_report(run_id="0009")
    before = far.arms["baseline"].model_copy(update={"dtype": "bfloat16"})
    far = far.model_copy(update={"arms": {**far.arms, "baseline": before}})
    with pytest.raises(UnlikeError, match="baseline dtype"):
        compare_table(frame_of([*runs, far]))


def test_a_few_bytes_of_memory_do_not_make_machines_unlike(runs, make_report):
    near = make_report(run_id="0009", machine={"memory_bytes": 8 * 2**30 - 4096})
    assert len(compare_table(frame_of([*runs, near]))) == 6


def test_the_refusal_leaves_with_code_2(runs, make_report):
    assert UnlikeError("x").exit_code == 2


def test_an_unknown_metric_is_refused(runs):
    with pytest.raises(OptkitError, match="no run has the metric 'speed'"):
        compare_table(frame_of(runs), speed="speed")


def test_without_quality_there_is_no_front_and_a_note_says_so(make_report):
    made = make_report()
    arms = {name: arm.model_copy(update={"metrics": {"tpot_ms": arm.metrics["tpot_ms"]}}) for name, arm in made.arms.items()}
    kept = tuple(entry for entry in made.comparisons if entry.metric == "tpot_ms")
    table = compare_table(frame_of([make_report(arms=arms, comparisons=kept, noise=(), limits=())]))
    assert not table["pareto"].any()
    assert any("no Pareto front" in note for note in table.attrs["notes"])
    assert "0.52" in to_markdown(table)
    assert "Quality against speed" not in to_html(table)


def test_quick_runs_and_runs_without_optimized_arm_are_noted(make_report):
    made = make_report()
    quick = make_report(run=made.run.model_copy(update={"quick": True, "id": "0002"}))
    alone = make_report(run_id="0003", arms={"baseline": made.arms["baseline"]}, comparisons=())
    notes = compare_table(frame_of([made, quick, alone])).attrs["notes"]
    assert any("quick" in note and "0002" in note for note in notes)
    assert any("no optimized arm in int4/0003" in note for note in notes)


def terminal(table: pd.DataFrame, width: int = 100) -> str:
    target = io.StringIO()
    print_comparison(table, Console(file=target, width=width))
    return target.getvalue()


@pytest.mark.parametrize("form", [terminal, to_markdown, to_html])
def test_the_forms_show_ratios_verdicts_and_the_front(runs, form):
    text = form(compare_table(frame_of(runs)))
    for part in ("0.52 [0.51, 0.53]", "simulated", "better", "Pareto front", "int8"):
        assert part in text


def test_simulated_speed_is_not_called_better(runs):
    line = next(line for line in to_markdown(compare_table(frame_of(runs))).splitlines() if "magnitude" in line)
    assert "simulated" in line
    assert "better" not in line
    row = next(row for row in csv.DictReader(to_csv(compare_table(frame_of(runs))).splitlines()) if row["transforms"] == "magnitude")
    assert (row["tpot_ms_verdict"], row["artefact_bytes_verdict"]) == ("simulated", "better")


def test_the_terminal_form_fits_100_columns_and_cuts_no_number(make_report):
    table = compare_table(frame_of([make_report(name="a-long-recipe-name-" * 4, steps=("drop_layers", "int4", "data_parallel"))]))
    text = terminal(table, 160)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "0.52 [0.51, 0.53]" in text


def test_csv_holds_every_column(runs):
    table = compare_table(frame_of(runs))
    rows = list(csv.DictReader(to_csv(table).splitlines()))
    assert list(rows[0]) == list(table.columns)
    assert [row["pareto"] for row in rows] == ["True", "True", "True", "False", "False"]
    assert float(rows[1]["tpot_ms_ratio"]) == 0.52


def test_json_has_no_nan(runs):
    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(to_json(compare_table(frame_of(runs))), parse_constant=refuse)
    assert document["schema"] == 1
    assert document["rows"][0]["tpot_ms_low"] is None
    assert document["rows"][1]["pareto"] is True


def test_hostile_names_are_text_in_every_form(make_report, hostile):
    table = compare_table(frame_of([make_report(name=hostile, run_id="=1+1", source=hostile, steps=(hostile,))]))
    page = to_html(table)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in to_markdown(table)
    assert "\x1b" not in page + to_markdown(table) + terminal(table) + to_csv(table)
    assert "'=1+1" in to_csv(table)


def test_the_command_prints_each_form_and_writes_files(experiments, tmp_path, capsys):
    compare([experiments])
    assert "0.52 [0.51, 0.53]" in capsys.readouterr().out
    compare([experiments], form="json")
    assert json.loads(capsys.readouterr().out)["rows"]
    compare([experiments], form="html", out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == ""


def test_the_command_refuses_a_file_for_the_terminal_table(experiments, tmp_path):
    with pytest.raises(OptkitError, match="--csv"):
        compare([experiments], out=tmp_path / "table.txt")
