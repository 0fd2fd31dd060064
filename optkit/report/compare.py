"""Runs beside each other: one row per run and one for the baseline, with the Pareto front of quality against per-token time.

Runs from unlike machines, data or baselines are refused unless asked for. The front goes by the estimates, not by their intervals.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from optkit.core.errors import OptkitError
from optkit.report.forms import print_comparison, to_csv, to_html, to_json, to_markdown
from optkit.report.metrics import HIGHER_IS_BETTER, base_of, family_of, in_order
from optkit.report.runs import VERDICT, frame_of, load_reports
from optkit.report.summary import BASELINE, OPTIMIZED
from optkit.report.text import plain

__all__ = [
    "UnlikeError",
    "compare_table",
    "frame_of",
    "load_reports",
    "pareto_front",
    "print_comparison",
    "to_csv",
    "to_html",
    "to_json",
    "to_markdown",
]

MACHINE = {"processor": "cpu", "cores": "cores", "threads": "threads", "memory": "memory_bytes", "device": "device", "GPUs": "gpus"}
DATA = {"task": "task", "data": "data_sha256", "items judged": "data_items"}
MODEL = {"model": "model", "model weights": "model_sha256"}
BEFORE = {"baseline dtype": "dtype", "baseline transforms": "transforms", "baseline processes": "ranks"}
_GIB = 2**30


class UnlikeError(OptkitError):
    """Runs that cannot be ranked against each other; the message says what differs."""


def compare_table(frame: pd.DataFrame, *, anyway: bool = False, speed: str | None = None, quality: str | None = None) -> pd.DataFrame:
    """Return the baseline's row and one row per run's optimized arm, the fastest first and simulated ones last.

    The baseline's values are the medians over the runs, its ratios 1. The column ``pareto`` is True where no other real row is at
    least as good in both quality ratio and time ratio and better in one; simulated rows are never on the front, and quick ones only
    where there are no others. ``attrs`` gains ``speed`` and ``quality``, the two metrics that were used ("" where there is none), and
    ``notes`` grows.

    Raises:
        UnlikeError: the runs differ in machine, data or baseline model, and ``anyway`` is False.
        OptkitError: a metric asked for is not in the frame.
    """
    differences = unlike(frame)
    if differences and not anyway:
        told = "".join(f"\n  {line}" for line in differences)
        raise UnlikeError(f"these runs cannot be ranked against each other:{told}\n  compare like runs, or rank them anyway with --anyway")
    units: Mapping[str, str] = frame.attrs.get("units", {})
    speed = _chosen(speed, _first(units, "timing"), units)
    quality = _chosen(quality, _first(units, "quality"), units)
    table = pd.concat([_baseline_row(frame, list(units)), frame[frame["arm"] == OPTIMIZED]], ignore_index=True)
    if f"{speed}_ratio" in table:
        rest = table.iloc[1:].sort_values(["execution", f"{speed}_ratio", "recipe", "run"], kind="stable", na_position="last")
        table = pd.concat([table.iloc[:1], rest], ignore_index=True)
    table["pareto"] = pareto_front(table, speed, quality, _higher_is_better(frame, quality))
    notes = [*frame.attrs.get("notes", []), *(f"unlike: {line}" for line in differences), *_remarks(frame, table, speed, quality)]
    table.attrs = {**frame.attrs, "notes": notes, "speed": speed, "quality": quality}
    return table


def unlike(frame: pd.DataFrame) -> list[str]:
    """Return what differs between the runs so that they cannot be ranked: machine, data, baseline model. Empty where nothing does."""
    befores = frame[frame["arm"] == BASELINE].assign(place=_places)
    lines = []
    for word, column in {**MACHINE, **DATA, **MODEL, **BEFORE}.items():
        shown = befores[column].map(_gibibytes) if column == "memory_bytes" else befores[column].astype("str")
        groups = befores.assign(told=shown.fillna("unknown")).groupby("told", sort=True)["place"].agg(list)
        if len(groups) > 1:
            lines.append(f"{word}: " + "; ".join(f"{_short(value)} in {_some(runs)}" for value, runs in groups.items()))
    return lines


def pareto_front(table: pd.DataFrame, speed: str, quality: str, higher_is_better: bool = False) -> pd.Series:
    """Return True for the rows with real speed that no other such row beats in ratio of quality and of per-token time."""
    columns = [f"{speed}_ratio", f"{quality}_ratio"]
    if not speed or not quality or any(column not in table for column in columns):
        return pd.Series(False, index=table.index)
    time, worth = table[columns[0]], table[columns[1]] * (-1 if higher_is_better else 1)
    counted = (table["execution"] == "real") & time.notna() & worth.notna()
    full = counted & ~table.get("quick", pd.Series(False, index=table.index)).astype(bool)
    counted = full if full.iloc[1:].any() else counted  # a first look beats no full run

    def is_beaten(row: int) -> bool:
        as_good = counted & (time <= time[row]) & (worth <= worth[row])
        return bool((as_good & ((time < time[row]) | (worth < worth[row]))).any())

    return pd.Series([bool(counted[row]) and not is_beaten(row) for row in table.index], index=table.index, dtype=bool)


def _baseline_row(frame: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    befores = frame[frame["arm"] == BASELINE]
    row = befores.iloc[[-1]].copy()
    for metric in metrics:
        middle = befores[metric].median()
        ratio = 1.0 if pd.notna(middle) and family_of(metric) != "fidelity" else float("nan")
        row = row.assign(**{metric: middle, f"{metric}_ratio": ratio, f"{metric}_low": float("nan"), f"{metric}_high": float("nan")})
    verdicts = {f"{metric}{VERDICT}": pd.Series([None], index=row.index, dtype="str") for metric in metrics}
    return row.assign(run="", recipe="(baseline)", quick=False, limits_held=pd.Series([None], index=row.index, dtype="boolean"), **verdicts)


def _first(units: Mapping[str, str], family: str) -> str:
    found = [metric for metric in in_order(units) if family_of(metric, units[metric]) == family and base_of(metric)[1] == 1]
    if family == "timing":
        found = [metric for metric in found if units[metric] == "ms"]
        return "tpot_ms" if "tpot_ms" in found else next(iter(found), "")
    return next(iter(found), "")


def _chosen(asked: str | None, otherwise: str, known: Mapping[str, str]) -> str:
    if asked is None:
        return otherwise
    if asked not in known:
        raise OptkitError(f"no run has the metric {asked!r}; known: {', '.join(in_order(known))}")
    return asked


def _higher_is_better(frame: pd.DataFrame, metric: str) -> bool:
    return bool(frame.attrs.get("higher_is_better", {}).get(metric, base_of(metric)[0] in HIGHER_IS_BETTER))


def _remarks(frame: pd.DataFrame, table: pd.DataFrame, speed: str, quality: str) -> list[str]:
    lines = []
    without = sorted(set(_places(frame)) - set(_places(frame[frame["arm"] == OPTIMIZED])))
    if without:
        lines.append(f"no optimized arm in {_some(without)}")
    if not speed or not quality:
        lines.append(f"no Pareto front: {'no per-token time' if not speed else 'no quality'} was measured")
    if table["quick"].any():
        lines.append(f"quick runs, made from fewer samples: {_some(list(_places(table[table['quick']])))}")
    versions = sorted(set(frame["torch"].dropna()))
    if len(versions) > 1:
        lines.append(f"made with different versions of torch: {', '.join(versions)}")
    return [plain(line) for line in lines]


def _places(frame: pd.DataFrame) -> pd.Series:
    return frame["recipe"] + "/" + frame["run"]


def _gibibytes(value: object) -> str:
    return f"{int(value) / _GIB:.0f} GiB" if isinstance(value, int) and not pd.isna(value) else "unknown"


def _short(value: object) -> str:
    text = plain(str(value), 60)
    return text[:12] if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text) else text


def _some(runs: list[str], count: int = 4) -> str:
    return ", ".join(plain(run, 60) for run in runs[:count]) + (f" and {len(runs) - count} more" if len(runs) > count else "")
