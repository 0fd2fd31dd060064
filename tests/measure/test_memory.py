"""Peak memory is the operating system's record, in bytes, since it was last forgotten."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optkit.measure import memory
from optkit.measure.memory import forget_peak, peak_bytes, resident_bytes

MIB = 2**20


def test_the_peak_keeps_what_was_used_and_given_back() -> None:
    forget_peak()
    before = peak_bytes()
    block = np.ones(64 * MIB // 8)
    assert resident_bytes() >= block.nbytes
    del block
    assert peak_bytes() >= before + 32 * MIB
    assert peak_bytes() >= resident_bytes()


def test_a_forgotten_peak_begins_anew() -> None:
    block = np.ones(128 * MIB // 8)
    del block
    high = peak_bytes()
    forget_peak()
    low = peak_bytes()
    if low == high:
        pytest.skip("this system does not forget a peak")
    assert low < high
    assert low == pytest.approx(resident_bytes(), rel=0.1)


@pytest.mark.parametrize("status", ["Name:\tpython\nVmRSS:\t 100 kB\n", None])
def test_a_system_that_keeps_no_peak_in_its_status_is_asked_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str | None
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "Path", lambda place: tmp_path / "status")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert used <= peak_bytes() / 1024 <= used * 1.1


def test_a_system_that_cannot_forget_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places: list[Any] = []
    monkeypatch.setattr(memory, "Path", lambda place: places.append(place) or tmp_path / "nowhere" / "clear_refs")
    forget_peak()
    assert places == ["/proc/self/clear_refs"]
