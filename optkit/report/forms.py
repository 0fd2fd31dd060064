"""A comparison of runs as terminal table, Markdown, page, CSV and JSON. The first three show the chosen metrics, the others all."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from optkit.core.files import json_text
from optkit.report.metrics import HIGHER_IS_BETTER, interval, number, scale_of, title_of
from optkit.report.page import VERDICTS, direction, render
from optkit.report.plots import Point, quality_speed_figure
from optkit.report.table import STYLES, WIDTH, markdown_table, plain_table
from optkit.report.text import for_csv, for_markdown, plain

TITLE = "Runs compared"
FRONT = "* on the Pareto front of {quality} against {speed}: no other real run is at least as good in both and better in one"
_ABOUT = "ratios are after/before; values below 1 are better for time, perplexity and size"
_TEXT_COLUMNS = 3


def print_comparison(table: pd.DataFrame, console: Console | None = None) -> None:
    """Print the comparison within 100 columns."""
    console = console or Console(width=None if Console().is_terminal else WIDTH)
    headers, rows = _cells(table)
    drawn = plain_table(headers, text_columns=_TEXT_COLUMNS)
    for row in rows:
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(drawn, width=min(console.width, WIDTH))
    for note in _notes(table):
        console.print(Text(note, style="dim"), width=min(console.width, WIDTH))


def to_markdown(table: pd.DataFrame) -> str:
    """Return the comparison as Markdown, every name escaped."""
    headers, rows = _cells(table)
    return (
        "\n".join([*markdown_table(headers, rows, _TEXT_COLUMNS), "", *(f"- {for_markdown(note, 2000)}" for note in _notes(table))]) + "\n"
    )


def to_csv(table: pd.DataFrame) -> str:
    """Return every column as CSV; empty where nothing was measured. Texts that a spreadsheet takes for formulas get an apostrophe."""
    safe = table.copy()
    for column in safe.columns[safe.dtypes == "str"]:
        safe[column] = safe[column].map(for_csv, na_action="ignore")
    text = io.StringIO()
    safe.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def to_json(table: pd.DataFrame) -> str:
    """Return ``{"schema": 1, "rows": [...], "notes": [...]}``: every column, null where nothing was measured."""
    rows = [{str(name): _jsonable(value) for name, value in row.items()} for row in table.to_dict(orient="records")]
    return json_text({"schema": 1, "rows": rows, "notes": _notes(table)})


def to_html(table: pd.DataFrame) -> str:
    """Return the comparison as one offline page in the style of the reports."""
    headers, rows = _cells(table)
    speed, quality = table.attrs.get("speed", ""), table.attrs.get("quality", "")
    return render(
        "compare.html",
        title=TITLE,
        headers=headers,
        rows=rows,
        text_columns=range(_TEXT_COLUMNS),
        verdicts=VERDICTS,
        notes=_notes(table),
        scatter=_scatter(table, speed, quality),
        scatter_caption=direction(f"{speed} ratio", f"{quality} ratio", _higher_is_better(table, quality)),
    )


def _cells(table: pd.DataFrame) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headers and rows of the short form: which run, quality, per-token time, size and memory; a star marks the front."""
    speed, quality = table.attrs.get("speed", ""), table.attrs.get("quality", "")
    units: Mapping[str, str] = table.attrs.get("units", {})
    shown = quality if quality in table else ""
    scale = scale_of(units.get(shown, ""), table[shown] if shown else ())
    named = (title_of(shown, scale) if shown else "quality", "ratio", f"{plain(speed, 40)} ratio" if speed else "time")
    headers = ("no", "recipe/run", "transforms", *named, "verdict", "size", "memory")
    rows: list[tuple[str, ...]] = []
    for index, row in enumerate(table.to_dict(orient="records")):
        value = row.get(shown, math.nan)
        rows.append(
            (
                f"{index}*" if row["pareto"] else str(index),
                "/".join(plain(str(part), 60) for part in (row["recipe"], row["run"]) if part),
                plain(str(row["transforms"]), 120),
                number(value * scale.factor) if shown else "-",
                _ratio(row, shown),
                _ratio(row, speed, with_interval=True),
                _told(row.get(f"{speed}_verdict")),
                _ratio(row, "artefact_bytes"),
                _ratio(row, "peak_memory_bytes"),
            )
        )
    return headers, rows


def _ratio(row: Mapping[Any, Any], metric: str, with_interval: bool = False) -> str:
    ratio = row.get(f"{metric}_ratio", math.nan)
    if row["recipe"] == "(baseline)":
        return "1" if ratio == 1 else "-"
    return interval(ratio, row[f"{metric}_low"], row[f"{metric}_high"]) if with_interval and metric else interval(ratio)


def _told(verdict: object) -> str:
    return verdict if isinstance(verdict, str) else "-"


def _notes(table: pd.DataFrame) -> list[str]:
    speed, quality = table.attrs.get("speed", ""), table.attrs.get("quality", "")
    front = [FRONT.format(speed=plain(speed, 60), quality=plain(quality, 60))] if table["pareto"].any() else []
    return [*front, _ABOUT, *(plain(note) for note in table.attrs.get("notes", []))]


def _scatter(table: pd.DataFrame, speed: str, quality: str) -> Markup | None:
    points = []
    for index, row in enumerate(table.to_dict(orient="records")):
        x, y = row.get(f"{speed}_ratio", math.nan), row.get(f"{quality}_ratio", math.nan)
        if math.isfinite(x) and math.isfinite(y):
            title = f"{row['recipe']} {row['run']}: time {number(x)}, quality {number(y)}, {row['transforms']}"
            points.append(Point(str(index), title, x, y, row["execution"] == "simulated"))
    if not points:
        return None
    figure = quality_speed_figure(points, f"{speed} ratio", f"{quality} ratio", "compared", legend=False)
    return Markup(figure)


def _higher_is_better(table: pd.DataFrame, metric: str) -> bool:
    return bool(table.attrs.get("higher_is_better", {}).get(metric, metric in HIGHER_IS_BETTER))


def _jsonable(value: Any) -> Any:
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value
