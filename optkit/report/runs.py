"""Finished runs as one tidy table: a row per run and arm, columns of declared types. Other runs are named, not counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from optkit.core.errors import ArtefactError, OptkitError
from optkit.core.files import MANIFEST, digest, is_sealed, read_json
from optkit.report.metrics import family_of, in_order
from optkit.report.record import REPORT_FILE, Arm, Report
from optkit.report.summary import transforms_of

COLUMNS = {
    "run": "str",
    "recipe": "str",
    "started": "str",
    "quick": "bool",
    "model": "str",
    "model_sha256": "str",
    "parameters": "int64",
    "trained": "bool",
    "task": "str",
    "corpus": "str",
    "data_sha256": "str",
    "data_items": "Int64",
    "cpu": "str",
    "cores": "Int64",
    "threads": "Int64",
    "memory_bytes": "Int64",
    "device": "str",
    "gpus": "str",
    "system": "str",
    "python": "str",
    "torch": "str",
    "limits_held": "boolean",
    "arm": "str",
    "label": "str",
    "transforms": "str",
    "execution": "str",
    "opens_in": "str",
    "dtype": "str",
    "ranks": "int64",
}
NUMBERS = ("", "_ratio", "_low", "_high")
VERDICT = "_verdict"
_DEEPEST = 3


def load_reports(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Return one row per run and arm of all finished runs under ``paths``: run folders, recipe folders, or the root of experiments.

    Columns are ``COLUMNS`` and for each metric ``m`` the value ``m`` (in its unit), ``m_ratio``, ``m_low``, ``m_high`` (after/before
    with its 95 % interval, float64, NaN where not measured) and ``m_verdict`` (text; ``simulated`` for the times of a simulated
    arm). ``frame.attrs`` holds ``notes`` (runs that
    were left out, with reasons), ``units`` and ``higher_is_better``, each by metric.

    Raises:
        ArtefactError: a path is missing, a run named directly is unfinished or damaged, or no finished run is found.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    reports: dict[Path, Report] = {}
    notes: list[str] = []
    for path in given:
        for folder in _runs_under(path):
            if folder.resolve() not in reports:
                _take(folder, reports, notes, named=folder == path)
    if not reports:
        told = "".join(f"\n  {note}" for note in notes)
        raise ArtefactError(f"no finished run under {', '.join(str(path) for path in given)}; make one with: optkit run RECIPE{told}")
    return frame_of(list(reports.values()), notes)


def frame_of(reports: list[Report], notes: Iterable[str] = ()) -> pd.DataFrame:
    """Return the tidy table of reports that are already loaded; see ``load_reports``."""
    entries = [(metric, entry) for report in reports for arm in report.arms.values() for metric, entry in arm.metrics.items()]
    metrics = in_order(metric for metric, _ in entries)
    clashes = sorted(COLUMNS.keys() & set(metrics))
    if clashes:
        raise ValueError(f"a metric has the name of a column: {', '.join(clashes)}")
    types = dict(COLUMNS)
    for metric in metrics:
        types |= {f"{metric}{end}": "float64" for end in NUMBERS} | {f"{metric}{VERDICT}": "str"}
    rows = [_row(report, name, arm) for report in reports for name, arm in report.arms.items()]
    frame = pd.DataFrame({column: _column([row.get(column) for row in rows], kind) for column, kind in types.items()})
    frame.attrs["notes"] = list(notes)
    frame.attrs["units"] = {metric: entry.unit for metric, entry in entries}
    frame.attrs["higher_is_better"] = {metric: entry.higher_is_better for metric, entry in entries}
    return frame


def _column(values: list[Any], kind: str) -> pd.Series:
    if kind == "float64":
        values = [float("nan") if value is None else value for value in values]
    return pd.Series(values, dtype=kind)


def _row(report: Report, name: str, arm: Arm) -> dict[str, Any]:
    row = _about_run(report) | {
        "arm": name,
        "label": arm.label,
        "transforms": transforms_of(arm),
        "execution": arm.execution,
        "opens_in": arm.opens_in,
        "dtype": arm.dtype,
        "ranks": arm.ranks,
    }
    for metric, entry in arm.metrics.items():
        row[metric] = entry.value
        compared = report.compared(name, metric)
        if compared:
            row |= {f"{metric}_ratio": compared.ratio, f"{metric}_low": compared.low, f"{metric}_high": compared.high}
            imitated = arm.execution == "simulated" and family_of(metric, entry.unit) == "timing"
            row[f"{metric}{VERDICT}"] = "simulated" if imitated else compared.verdict
    return row


def _about_run(report: Report) -> dict[str, Any]:
    run, model, data, machine = report.run, report.model, report.data, report.environment
    return {
        "run": run.id,
        "recipe": run.name,
        "started": run.started,
        "quick": run.quick,
        "model": model.source,
        "model_sha256": model.sha256,
        "parameters": model.parameters,
        "trained": model.trained,
        "task": data.task if data else None,
        "corpus": data.corpus if data else None,
        "data_sha256": data.sha256 if data else None,
        "data_items": data.items if data else None,
        "limits_held": report.held if report.limits else None,
        **{name: _text(machine.get(name)) for name in ("cpu", "device", "system", "python")},
        **{name: _whole(machine.get(name)) for name in ("cores", "threads", "memory_bytes")},
        "gpus": ", ".join(str(gpu) for gpu in machine.get("gpus") or ()) or None,
        "torch": _text((machine.get("packages") or {}).get("torch")),
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _runs_under(path: Path, depth: int = _DEEPEST) -> Iterator[Path]:
    """Yield the folders of runs, in the order of their names. A folder with a report or a manifest is a run and is not searched."""
    if path.name == REPORT_FILE and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ArtefactError(f"{path} is no folder of runs; give a run, a recipe's folder or the root of experiments")
    if (path / REPORT_FILE).is_file() or is_sealed(path) or _looks_begun(path):
        yield path
    elif depth > 0:
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_under(entry, depth - 1)


def _looks_begun(path: Path) -> bool:
    """Say whether this is a run without report yet: a number for a name, and no numbered folders inside as a recipe's folder has."""
    inside = list(path.iterdir())
    return path.name.isdecimal() and bool(inside) and not any(entry.name.isdecimal() for entry in inside)


def _take(folder: Path, reports: dict[Path, Report], notes: list[str], named: bool) -> None:
    try:
        reports[folder.resolve()] = _sealed_report(folder)
    except OptkitError as error:
        if named:
            raise
        notes.append(f"{folder.parent.name}/{folder.name} is left out: {error}")


def _sealed_report(folder: Path) -> Report:
    if not is_sealed(folder):
        raise ArtefactError(f"{folder} is not finished; go on with: optkit run RECIPE --resume")
    entry = _manifest_entry(folder)
    if entry is not None and entry != digest(folder / REPORT_FILE):
        raise ArtefactError(f"{folder / REPORT_FILE} was changed after the run; run the recipe again")
    report = Report.load(folder)
    try:
        frame_of([report])
    except (OverflowError, TypeError, AttributeError, ValueError) as error:
        raise ArtefactError(f"{folder / REPORT_FILE} is damaged: {error}; run the recipe again") from None
    return report


def _manifest_entry(folder: Path) -> str | None:
    """Return the digest that the manifest gives for the report; None where the report itself is missing, which loading then says."""
    manifest = read_json(folder / MANIFEST)
    try:
        recorded = str(manifest["files"][REPORT_FILE]["sha256"])
    except (KeyError, TypeError):
        raise ArtefactError(f"{folder / MANIFEST} names no {REPORT_FILE}; run the recipe again") from None
    return recorded if (folder / REPORT_FILE).is_file() else None
