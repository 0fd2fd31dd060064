"""Whether a process works is seen from outside, and where it hangs is asked from inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optkit.harness.pulse import WAITS, Pulse, Watch, innermost

BUSY = Pulse("R", 100, 5), Pulse("R", 150, 5)


@pytest.mark.parametrize(
    ("before", "after", "works"),
    [
        (Pulse("R", 100, 5), Pulse("R", 150, 5), True),
        (Pulse("S", 100, 5), Pulse("S", 100, 900), True),
        (Pulse("S", 100, 5), Pulse("D", 100, 5), True),
        (Pulse("S", 100, 5), Pulse("S", 101, 5), False),
        (Pulse(), Pulse(), True),  # where nothing is known, nobody is accused
    ],
)
def test_work_is_time_computed_or_bytes_moved(monkeypatch: pytest.MonkeyPatch, before: Pulse, after: Pulse, works: bool) -> None:
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch = Watch()
    watch.still_s([before])
    assert watch.still_s([after]) == (0.0 if works else 1.0)


def test_one_that_works_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch, idle = Watch(), Pulse("S", 1, 1)
    watch.still_s([idle, BUSY[0]])
    assert watch.still_s([idle, BUSY[1]]) == 0


def test_a_stopped_process_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert Pulse.of(process.pid).is_stopped
        process.kill()
    assert not Pulse.of(process.pid).is_stopped


def test_the_last_stack_in_a_file_tells_where(tmp_path: Path) -> None:
    stack = tmp_path / "stack"
    assert innermost(stack) == "it tells nothing of where it is"
    first = 'Current thread (most recent call first):\n  File "/a/latency.py", line 95 in block\n'
    stack.write_text(first)
    assert innermost(stack) == "in block (latency.py, line 95)"
    stack.write_text(first + 'Current thread (most recent call first):\n  File "/torch/distributed_c10d.py", line 7 in recv\n')
    assert innermost(stack).startswith(WAITS)
