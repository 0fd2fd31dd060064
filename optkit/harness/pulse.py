"""Whether a process still works, and where it hangs if not: seen from outside, by what the system counts of it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WAITS = "waits for others"
_WAITING_IN = ("distributed_c10d.py", "peers.py", "group.py", "accelerate")
_LEAST_TICKS = 5  # of a hundred a second
_FRAME = re.compile(r'File "(.*?)", line (\d+) in (\S+)')


@dataclass(frozen=True)
class Pulse:
    """The state letter of a process; the ticks that it and its children have computed, and the bytes that they have read and written.

    Zeros where that is not known.
    """

    state: str = ""
    ticks: int = 0
    moved: int = 0

    @classmethod
    def of(cls, pid: int) -> Pulse:
        """Look at a process now. A compiler that it has started works for it."""
        import psutil

        own = cls._alone(pid)
        try:
            children = [cls._alone(child.pid) for child in psutil.Process(pid).children(recursive=True)]
        except psutil.Error:
            children = []
        return cls(own.state, own.ticks + sum(one.ticks for one in children), own.moved + sum(one.moved for one in children))

    @classmethod
    def _alone(cls, pid: int) -> Pulse:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        except (OSError, ValueError):
            return cls()
        return cls(fields[0], int(fields[11]) + int(fields[12]), int(io["rchar"]) + int(io["wchar"]))

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self.state in ("T", "t")


class Watch:
    """Says for how long none of some processes has worked. Where the system tells nothing of processes, it never has."""

    def __init__(self) -> None:
        self._last: list[Pulse] = []
        self._still_since = time.monotonic()

    def still_s(self, pulses: Sequence[Pulse]) -> float:
        """Return the seconds without work; call it about once a second, with the same processes."""
        now = time.monotonic()
        if len(pulses) != len(self._last) or any(map(self._works, self._last, pulses)) or not all(pulse.state for pulse in pulses):
            self._still_since = now
        self._last = list(pulses)
        return now - self._still_since

    def _works(self, before: Pulse, after: Pulse) -> bool:
        waits_for_disk = after.state == "D"
        return waits_for_disk or after.moved != before.moved or after.ticks - before.ticks >= _LEAST_TICKS


def innermost(stack: Path) -> str:
    """Return where the last stack in a file ends: in which function of which file; ``WAITS`` where that is a wait for other processes."""
    try:
        text = stack.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it tells nothing of where it is"
    frames = _FRAME.findall(text.rpartition("most recent call first")[2])
    if not frames:
        return "it tells nothing of where it is"
    file, line, function = frames[0]
    waits = any(name in frame[0] for name in _WAITING_IN for frame in frames[:4])
    return f"{WAITS} in {function}" if waits else f"in {function} ({Path(file).name}, line {line})"
