"""Where what can be made again is kept between runs: compiled kernels, trained networks."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder, ``$OPTKIT_CACHE`` or the user's cache; None where others may write to it."""
    chosen = os.environ.get("OPTKIT_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optkit"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    # A library that others can replace would be code of theirs in our process.
    foreign = status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if foreign else folder
