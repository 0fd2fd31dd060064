"""``optkit verify``: compare a result or an artefact with the digests it was sealed with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs or artefacts", metavar="FOLDER...", show_default=False)],
) -> None:
    """Check that results and artefacts are complete and unchanged. A run's artefact has a manifest of its own, and may be gone."""
    from optkit.core import files
    from optkit.models.artefact import MANIFEST

    for folder in folders:
        is_artefact = (folder / MANIFEST).exists() and not files.is_sealed(folder)
        manifest = files.verify(folder, MANIFEST if is_artefact else files.MANIFEST)
        count, gone = len(manifest["files"]), ""
        if not is_artefact and (folder / "artefact").is_dir():
            count += len(files.verify(folder / "artefact", MANIFEST)["files"])
        elif not is_artefact:
            gone = "; its artefact is not here"
        sys.stdout.write(f"{folder}: {count} files as written{gone}\n")
