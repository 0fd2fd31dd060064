"""Peak memory of the arm's processes while they serve, from the operating system's own record."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from optkit.measure.contract import Meter


class Memory(Meter):
    """No settings: the peak resident memory since serving began, the Python runtime included."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process since ``forget_peak``, or since its start where the system cannot forget."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # some sandboxes leave it out
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    import psutil

    size: int = psutil.Process().memory_info().rss
    return size


def forget_peak() -> None:
    """Let the peak begin anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
