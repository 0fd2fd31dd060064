"""What a result was made on: processor, memory, system and the versions that matter. No host name, no user name, no path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("optkit", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def environment() -> dict[str, Any]:
    """Return the machine and the versions as plain JSON."""
    import psutil

    flags = cpu_flags()
    return {
        "cpu": _cpu_name(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def cpu_flags() -> frozenset[str]:
    """Return the instruction-set flags of this processor; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), frozenset())


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
