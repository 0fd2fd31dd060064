from __future__ import annotations

import csv
import errno
import os

import pytest

from optkit.core.errors import ResourceError
from optkit.core.files import seal, verify
from optkit.report.folder import samples_csv, write_report
from optkit.report.record import Report


def test_a_run_folder_holds_the_five_forms_and_can_be_sealed(make_report, tmp_path, recipe_text):
    write_report(make_report(), tmp_path, recipe_text)
    seal(tmp_path)
    assert set(verify(tmp_path)["files"]) == {"recipe.yaml", "report.json", "samples.csv", "table.md", "report.html"}
    assert (tmp_path / "recipe.yaml").read_text() == recipe_text
    assert Report.load(tmp_path) == make_report()


def test_samples_csv_holds_every_sample_in_order(make_report):
    made = make_report()
    rows = list(csv.DictReader(samples_csv(made).splitlines()))
    assert list(rows[0]) == ["arm", "metric", "unit", "index", "value"]
    taken = [float(row["value"]) for row in rows if (row["arm"], row["metric"]) == ("optimized", "tpot_ms")]
    assert tuple(taken) == made.arms["optimized"].metrics["tpot_ms"].samples
    assert len(rows) == sum(len(entry.samples) for arm in made.arms.values() for entry in arm.metrics.values())


def test_a_name_is_no_formula_in_a_spreadsheet(make_report):
    rows = csv.DictReader(samples_csv(make_report(others=("=1+1",))).splitlines())
    assert "'=1+1" in {row["arm"] for row in rows}


def test_a_full_disk_is_said_and_leaves_no_half_file(make_report, tmp_path, recipe_text, monkeypatch):
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "full")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_report(make_report(), tmp_path, recipe_text)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "samples.csv"}
