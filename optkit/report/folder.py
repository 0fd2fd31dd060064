"""The five forms of a report in the folder of its run. It seals nothing: the manifest is the harness's last act."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from optkit.core.files import write_text
from optkit.report.page import to_html
from optkit.report.record import REPORT_FILE, Report
from optkit.report.table import to_markdown
from optkit.report.text import for_csv

RECIPE_FILE = "recipe.yaml"
SAMPLES_FILE = "samples.csv"
TABLE_FILE = "table.md"
PAGE_FILE = "report.html"


def write_report(report: Report, folder: Path, recipe_yaml: str) -> None:
    """Write recipe.yaml, samples.csv, table.md, report.html and, last, report.json into an existing folder.

    Raises:
        ResourceError: the disk is full.
        PlaceError: it is read-only or forbidden for this user.
    """
    forms = {
        RECIPE_FILE: recipe_yaml,
        SAMPLES_FILE: samples_csv(report),
        TABLE_FILE: to_markdown(report),
        PAGE_FILE: to_html(report, recipe_yaml),
        REPORT_FILE: report.to_json(),
    }
    for name, text in forms.items():
        write_text(folder / name, text)


def samples_csv(report: Report) -> str:
    """Return every sample as one line: arm, metric, unit, index in the order taken, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "metric", "unit", "index", "value"))
    for name, arm in report.arms.items():
        for metric, entry in arm.metrics.items():
            head = (for_csv(name), for_csv(metric), for_csv(entry.unit))
            writer.writerows((*head, index, value) for index, value in enumerate(entry.samples))
    return text.getvalue()
