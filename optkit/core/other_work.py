"""What else this machine is doing: how many of the cores that this process may use are kept busy by others."""

from __future__ import annotations

import os
import time

import psutil

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_SHORTEST_S = 0.05  # counters of the system move every 10 ms


class OtherWork:
    """Reads the system's counters of busy time; what this process did itself is taken off."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last = self._read()
        self._cores = 0.0

    def cores(self) -> float:
        """Return how many cores others have kept busy since the last look, on the average; looks too near to it return what that found."""
        before, now = self._last, self._read()
        seconds = now[0] - before[0]
        if seconds >= _SHORTEST_S:
            self._cores = max(0.0, (now[1] - before[1]) - (now[2] - before[2])) / seconds
            self._last = now
        return self._cores

    def _read(self) -> tuple[float, float, float]:
        """Return the time, and the seconds that all of these cores and that this process have been busy, since their beginnings."""
        mine = self._process.cpu_times()
        rows = psutil.cpu_times(percpu=True)
        busy = sum(getattr(rows[core], name, 0.0) for core in usable_cores() if core < len(rows) for name in _BUSY)
        return time.monotonic(), busy, mine.user + mine.system


def usable_cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
