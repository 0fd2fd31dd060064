"""What a bench of kernels found, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optkit.core.files import json_text
from optkit.report.metrics import number
from optkit.report.table import markdown_table

SCHEMA = 1
_HEADERS = ("tokens", "kernel", "MB", "ms", "GB/s", "time against", "ratio (95 % interval)")


@dataclass(frozen=True)
class Line:
    """One kernel. ``ratio`` is its time against the reference's, with a 95 % interval; None where it is the reference.

    For few tokens the reference only reads, and its time is scaled to the bytes of this kernel: 1 / ratio is the share of the roof.
    """

    kernel: str
    tokens: int
    ms: float
    weight_bytes: int
    bytes_per_second: float
    against: str
    ratio: float | None
    low: float | None
    high: float | None


def to_json(lines: Sequence[Line], sizes: dict[str, int], environment: dict[str, Any]) -> str:
    """Return the bench as JSON: ``schema``, ``sizes``, ``environment`` and ``lines``."""
    found = {"schema": SCHEMA, "sizes": sizes, "environment": environment, "lines": [asdict(line) for line in lines]}
    return json_text(found)


def to_markdown(lines: Sequence[Line], title: str) -> str:
    """Return a title and a table with a row for each line."""
    rows = [
        (
            str(line.tokens),
            line.kernel,
            number(line.weight_bytes / 1e6),
            number(line.ms),
            number(line.bytes_per_second / 1e9),
            line.against,
            "-" if line.ratio is None else f"{line.ratio:.2f} [{line.low:.2f}, {line.high:.2f}]",
        )
        for line in lines
    ]
    return "\n".join([f"# {title}", "", *markdown_table(_HEADERS, rows, text_columns=2), ""])
