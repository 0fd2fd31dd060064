"""``optkit verify``: compare a result or an artefact with the digests it was sealed with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs or artefacts", metavar="FOLDER...", show_default=False)],
) -> None:
    """Check that results and artefacts are complete and unchanged."""
    from optkit.core import files
    from optkit.models.artefact import MANIFEST

    for folder in folders:
        is_artefact = (folder / MANIFEST).exists() and not files.is_sealed(folder)
        manifest = files.verify(folder, MANIFEST if is_artefact else files.MANIFEST)
        sys.stdout.write(f"{folder}: {len(manifest['files'])} files as written\n")
