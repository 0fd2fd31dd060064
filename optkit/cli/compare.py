"""``optkit compare``: runs beside each other, in the terminal or as data. It reads results and changes none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

Form = Literal["terminal", "csv", "markdown", "html", "json"]
_FORMS: tuple[Form, ...] = ("csv", "markdown", "html", "json")


def compare_command(
    paths: Annotated[
        list[Path], typer.Argument(help="runs, recipes' folders, or the folder of experiments", metavar="PATH...", show_default=False)
    ],
    csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
    html: Annotated[bool, typer.Option("--html", help="print one offline HTML page")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="write to this file instead of standard output")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="rank runs of unlike machines, data or models too")] = False,
    speed: Annotated[str | None, typer.Option("--speed", help="metric of speed; default: time per token")] = None,
    quality: Annotated[str | None, typer.Option("--quality", help="metric of quality; default: the task's first")] = None,
) -> None:
    """Set runs beside each other, with the Pareto front of quality against speed."""
    chosen: list[Form] = [form for form, wanted in zip(_FORMS, (csv, markdown, html, as_json), strict=True) if wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of {', '.join(f'--{form}' for form in chosen)}")
    compare(paths, chosen[0] if chosen else "terminal", out, anyway, speed, quality)


def compare(
    paths: Sequence[Path],
    form: Form = "terminal",
    out: Path | None = None,
    anyway: bool = False,
    speed: str | None = None,
    quality: str | None = None,
) -> None:
    """Print the comparison of all finished runs under ``paths``, or write it to the file ``out``.

    Raises:
        UnlikeError: the runs differ in machine, data or baseline model, and ``anyway`` is False.
        ArtefactError: no finished run is found, or one that is named is damaged.
        ResourceError: the disk is full.
        PlaceError: ``out`` exists already or cannot be written.
    """
    from optkit.core.errors import OptkitError, PlaceError
    from optkit.core.files import write_text
    from optkit.report.compare import compare_table, load_reports, print_comparison, to_csv, to_html, to_json, to_markdown

    if out is not None and form == "terminal":
        raise OptkitError(f"the terminal table is not written to a file; for {out} choose --csv, --markdown, --html or --json")
    if out is not None and (out.exists() or out.is_symlink()):
        raise PlaceError(f"{out} exists already and is not overwritten; choose another file with --out")
    if out is not None and not out.parent.is_dir():
        raise PlaceError(f"{out} cannot be written: there is no folder {out.parent}")
    table = compare_table(load_reports(paths), anyway=anyway, speed=speed, quality=quality)
    if form == "terminal":
        print_comparison(table)
        return
    text = {"csv": to_csv, "markdown": to_markdown, "html": to_html, "json": to_json}[form](table)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
