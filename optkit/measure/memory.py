"""Peak memory of the arm's processes while they serve: from the operating system's own record, on CUDA from PyTorch's allocator."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from optkit.core.device import CPU
from optkit.measure.contract import Meter


class Memory(Meter):
    """No settings: the peak resident memory since serving began, the Python runtime included; on CUDA the peak of tensors there."""


def peak_bytes(device: torch.device = CPU) -> int:
    """Return the peak memory of this process on a device since ``forget_peak``, or since its start where the system cannot forget."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # some sandboxes leave it out
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: torch.device = CPU) -> int:
    """Return the memory of this process on a device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    size: int = psutil.Process().memory_info().rss
    return size


def forget_peak(device: torch.device = CPU) -> None:
    """Let the peak begin anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
