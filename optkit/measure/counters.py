"""What the processor counts: ticks of its clock always; cycles, instructions and misses where the system lets one read them; energy too.

What cannot be read is said to be unavailable, with the reason, and never guessed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optkit.kernels.native import native

_EVENTS = {"core_cycles": 0, "instructions": 1, "cache_misses": 3}  # PERF_TYPE_HARDWARE, see perf_event_open(2)
_OPEN = {"x86_64": 298, "aarch64": 241}
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403
_ATTRIBUTE_BYTES, _INHERIT, _EXCLUDE_KERNEL = 128, 1 << 1, 1 << 5
_POWER = Path("/sys/class/powercap")


def ticks_per_second(seconds: float = 0.05) -> float | None:
    """Return how fast the time-stamp counter runs, measured against the clock of the system; None where there are no kernels to read it."""
    found = native()
    if found is None:
        return None
    start, first = time.perf_counter(), found.ticks()
    time.sleep(seconds)
    last, end = found.ticks(), time.perf_counter()
    return (last - first) / (end - start)


class Counters:
    """Core cycles, instructions and cache misses of this process and of the threads that it starts later."""

    def __init__(self) -> None:
        self.unavailable: str | None = None
        self.values: dict[str, int] = {}
        self._handles: dict[str, int] = {}
        number = _OPEN.get(platform.machine())
        if platform.system() != "Linux" or number is None:
            self.unavailable = f"counters are read on Linux, on x86-64 and ARM; this is {platform.system()} on {platform.machine()}"
            return
        call = ctypes.CDLL(None, use_errno=True).syscall
        for name, event in _EVENTS.items():
            attribute = bytearray(_ATTRIBUTE_BYTES)
            struct.pack_into("IIQQQQQ", attribute, 0, 0, _ATTRIBUTE_BYTES, event, 0, 0, 0, _INHERIT | _EXCLUDE_KERNEL | 1)
            handle = call(number, (ctypes.c_char * _ATTRIBUTE_BYTES).from_buffer(attribute), 0, -1, -1, 0)
            if handle < 0:
                self.unavailable = f"the system does not let this process count {name}: {os.strerror(ctypes.get_errno())}"
                self.close()
                return
            self._handles[name] = handle

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, and keep what has been counted in ``values``."""
        import fcntl

        for handle in self._handles.values():
            fcntl.ioctl(handle, _RESET, 0)
            fcntl.ioctl(handle, _ENABLE, 0)
        try:
            yield
        finally:
            for name, handle in self._handles.items():
                fcntl.ioctl(handle, _DISABLE, 0)
                self.values[name] = struct.unpack("Q", os.read(handle, 8))[0]

    def close(self) -> None:
        """Let go of the counters."""
        for handle in self._handles.values():
            with suppress(OSError):
                os.close(handle)
        self._handles = {}


def energy_joules() -> tuple[float | None, str | None]:
    """Return the joules that the processor packages have used since some moment, or None and the reason."""
    places = sorted(_POWER.glob("intel-rapl:[0-9]*/energy_uj"))
    if not places:
        return None, "this system has no RAPL counters (/sys/class/powercap)"
    try:
        return sum(int(place.read_text()) for place in places) / 1e6, None
    except OSError as error:
        return None, f"RAPL counters cannot be read: {error.strerror}"
