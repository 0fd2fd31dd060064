"""The one table of a report for the terminal and as Markdown. Colors only repeat what a word says; it fits 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optkit.report.record import Report
from optkit.report.summary import HEADERS, Block, Row, summarize
from optkit.report.text import for_markdown

WIDTH = 100
_INTERVAL = re.compile(r"-?[\d.,]+ \[-?[\d.,]+, -?[\d.,]+\]( simulated)?")
STYLES = {"better": "green", "worse": "red", "unclear": "yellow", "simulated": "yellow", "same": "dim"}


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the table; on a console that is wider than 100 columns it stays at 100."""
    console = console or Console(width=None if Console().is_terminal else WIDTH)
    console.print(to_terminal(report), width=min(console.width, WIDTH))


def to_terminal(report: Report) -> RenderableType:
    """Return the table with all that belongs to it, for rich. Names are drawn as they are, never read as markup."""
    summary = summarize(report)
    parts: list[RenderableType] = [Text(summary.title, style="bold")]
    parts += [Text(line, style="dim") for line in summary.facts]
    parts.append(_main_table(summary.rows))
    for block in summary.blocks:
        parts += [_block_table(block), Padding(Text(block.about, style="dim"), (0, 0, 1, 1))]
    parts.append(_line("speed", summary.speed))
    parts.append(_line("noise floor", f"baseline against itself: {summary.noise}"))
    parts += [_line("scaling", text) for text in summary.scaling]
    parts += [_line("limit", text, "green" if held else "bold red") for text, held in summary.limits]
    parts += [_line("note", note) for note in summary.notes]
    return Group(*parts)


def to_markdown(report: Report) -> str:
    """Return the same table as Markdown, every name escaped."""
    summary = summarize(report)
    lines = [f"# {for_markdown(summary.title)}", ""]
    lines += [f"- {for_markdown(fact)}" for fact in summary.facts]
    rows = [(row.title, row.before, row.after, row.ratio, row.verdict) for row in summary.rows]
    lines += ["", *markdown_table(HEADERS, rows)]
    for block in summary.blocks:
        lines += ["", *markdown_table(block.headers, block.rows), "", for_markdown(block.about, 1000)]
    lines += ["", f"- speed: {for_markdown(summary.speed)}"]
    lines.append(f"- noise floor (baseline against itself): {for_markdown(summary.noise, 2000)}")
    lines += [f"- scaling: {for_markdown(text)}" for text in summary.scaling]
    lines += [f"- limit: {for_markdown(text)}" for text, _ in summary.limits]
    lines += [f"- note: {for_markdown(note)}" for note in summary.notes]
    return "\n".join(lines) + "\n"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Return the lines of a Markdown table; the first columns are text, the others are aligned to the right."""
    grid = [[_cell(cell) for cell in line] for line in (headers, *rows)]
    widths = [max(3, *(len(line[column]) for line in grid)) for column in range(len(headers))]
    sides = ["<" if column < text_columns else ">" for column in range(len(headers))]
    lines = [
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)) + " |" for line in grid
    ]
    marks = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)]
    return [lines[0], f"| {' | '.join(marks)} |", *lines[1:]]


def plain_table(headers: Sequence[str], text_columns: int = 1) -> Table:
    """Return an empty rich table in the style of all tables: the first columns are text, the others are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for column, header in enumerate(headers):
        is_text = column < text_columns
        table.add_column(Text(header), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    return table


def _main_table(rows: Iterable[Row]) -> RenderableType:
    table = plain_table(HEADERS)
    for row in rows:
        verdict = Text(row.verdict, style=STYLES.get(row.verdict, ""))
        table.add_row(Text(row.title), Text(row.before), Text(row.after), Text(row.ratio), verdict)
    return Padding(table, (1, 0))


def _block_table(block: Block) -> Table:
    table = plain_table(block.headers)
    for row in block.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _line(word: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{word}: ", "bold"), (text, style))


def _cell(text: str) -> str:
    return text if _INTERVAL.fullmatch(text) else for_markdown(text)
