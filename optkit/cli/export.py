"""``optkit export``: write an artefact in the format of another tool."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """The formats that can be written."""

    compressed_tensors = "compressed-tensors"


def export(
    artefact: Annotated[Path, typer.Argument(help="folder of an artefact, or of a run", metavar="ARTEFACT", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="a folder that does not exist yet", show_default=False)],
    format: Annotated[Format, typer.Option("--format", help="the format to write")] = Format.compressed_tensors,
) -> None:
    """Write an artefact so that other loaders open it. What the format cannot say exactly is refused, never rounded."""
    from optkit.models.artefact import MANIFEST, load
    from optkit.models.interchange.export import export_compressed_tensors

    inside = artefact / "artefact"
    subject = load(inside if not (artefact / MANIFEST).exists() and inside.is_dir() else artefact)
    card = export_compressed_tensors(subject, out)
    sys.stdout.write(f"{out}: {format.value}\n\n{card}")
