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
    from optkit.core.errors import OptkitError

    failed = []
    for folder in folders:
        try:
            sys.stdout.write(f"{_verified(folder)}\n")
        except OptkitError as error:
            failed.append(error)
    if failed:
        raise OptkitError("\n".join(map(str, failed)))


def _verified(folder: Path) -> str:
    from optkit.core import files
    from optkit.models.artefact import MANIFEST

    is_artefact = (folder / MANIFEST).exists() and not files.is_sealed(folder)
    manifest = files.verify(folder, MANIFEST if is_artefact else files.MANIFEST)
    count, gone = len(manifest["files"]), ""
    if not is_artefact and (folder / "artefact").is_dir():
        count += len(files.verify(folder / "artefact", MANIFEST)["files"])
    elif not is_artefact:
        gone = "; its artefact is not here"
    return f"{folder}: {count} file{'s' if count != 1 else ''} as written{gone}"
