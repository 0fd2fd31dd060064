"""Sums over the processes of one host through shared memory: some microseconds for a vector, where a network's way takes hundreds.

Where there is no compiler, or the processes are on several hosts, ``torch.distributed`` does it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from optkit.core.errors import ArmError
from optkit.kernels.native import native

_LINE, _CAPACITY = 64, 1 << 18
LIMIT_S, PEER_LATE = 20.0, -4


class Peers(Protocol):
    """Processes that hold one layer together. All of them make the same calls in the same order."""

    rank: int
    size: int

    @property
    def waited_s(self) -> float:
        """Seconds in sums so far, waiting for the others included."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of everyone's tensor, in its dtype; the sum itself is taken in float32.

        Raises:
            ArmError: somebody does not come.
        """


class _Struct(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("turn", ctypes.c_uint64),
        ("memory", ctypes.c_void_p),
        ("limit_s", ctypes.c_double),
        ("waited_s", ctypes.c_double),
        ("late", ctypes.c_int64),
    )


class SharedPeers:
    """Peers on one host, over a file that all of them have mapped."""

    def __init__(self, path: Path, rank: int, size: int, limit_s: float = LIMIT_S) -> None:
        """Map a file that ``shared_file`` has made for so many processes."""
        found = native()
        assert found is not None, "ask native() first"
        self._sum = found.sum
        self.rank, self.size = rank, size
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _bytes(size))
        self._view = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
        self._struct = _Struct(rank, size, _CAPACITY, 0, ctypes.addressof(self._view), limit_s, 0.0, 0)
        self.address = ctypes.addressof(self._struct)

    @property
    def waited_s(self) -> float:
        """Seconds in sums so far."""
        return float(self._struct.waited_s)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of everyone's tensor; it takes the place of the given one where that is float32 and dense."""
        wide = tensor.float().contiguous()
        self.refuse_late(self._sum(self.address, wide.data_ptr(), wide.numel()))
        return wide.to(tensor.dtype)

    def refuse_late(self, status: int) -> None:
        """Raise for a sum that somebody did not come to.

        Raises:
            ArmError: names who.
        """
        if status:
            raise ArmError(f"shard {self._struct.late} did not come to a sum within {self._struct.limit_s:g} s")


class DistributedPeers:
    """Peers anywhere, by a process group of ``torch.distributed``."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group = group
        self.rank, self.size = rank, size
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds in sums so far."""
        return self._waited_s

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of everyone's tensor."""
        import torch.distributed as dist

        start = time.perf_counter()
        wide = tensor.float().contiguous()
        wide = wide.clone() if wide.data_ptr() == tensor.data_ptr() else wide
        try:
            dist.all_reduce(wide, group=self._group)
        except RuntimeError as error:
            raise ArmError(f"a shard did not come to a sum: {error}") from None
        self._waited_s += time.perf_counter() - start
        return wide.to(tensor.dtype)


def shared_file(size: int) -> Path:
    """Make a file for so many processes to share, in memory where the system has a place for that; whoever has it mapped may unlink it."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the name is drawn, and the file is the user's alone
    handle, name = tempfile.mkstemp(prefix="optkit-", dir=place)
    with os.fdopen(handle, "r+b") as file:
        file.truncate(_bytes(size))
    return Path(name)


def _bytes(size: int) -> int:
    return size * _LINE + 2 * size * _CAPACITY * 4
