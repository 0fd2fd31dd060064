"""What others do on this machine is seen, and what this process does is not taken for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from optkit.core.other_work import OtherWork, usable_cores


def test_the_work_of_others_is_told_in_cores() -> None:
    other = OtherWork()
    with subprocess.Popen([sys.executable, "-c", "print('on', flush=True)\nwhile True: pass"], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None and busy.stdout.readline()
        other.cores()
        found = 0.0
        end = time.monotonic() + 30
        while found < 0.3 and time.monotonic() < end:
            time.sleep(0.3)
            found = other.cores()
        busy.kill()
    assert 0.3 <= found <= len(usable_cores()) + 0.5


def test_own_work_is_no_work_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([(0.0, 100.0, 7.0), (10.0, 115.0, 12.0), (20.0, 118.0, 16.0)])  # seconds: the time, all work, own work
    monkeypatch.setattr(OtherWork, "_read", lambda self: next(looks))
    other = OtherWork()
    assert other.cores() == 1.0
    assert other.cores() == 0.0  # counters are not read in one moment: own work can seem to be more than all


def test_a_look_at_once_after_another_gives_the_same() -> None:
    other = OtherWork()
    time.sleep(0.1)
    assert other.cores() == other.cores()
