"""The door to the compiled kernels: which backend runs here, and why. Without Linux on x86-64, AVX2 or a compiler it is plain PyTorch.

Backends are a ladder: each has the instruction sets of those below it. ``OPTKIT_KERNELS`` asks for one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from optkit.core.environment import cpu_flags
from optkit.core.errors import MissingError, OptkitError
from optkit.kernels.build import open_library

Backend = Literal["amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "torch"]

# What each step of the ladder adds: the processor's flags, and the compiler's names of them.
_STEPS: Mapping[Backend, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx2": (("avx2", "fma", "f16c"), ("avx2", "fma", "f16c")),
    "avx512": (("avx512f", "avx512bw", "avx512dq", "avx512vl"), ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    "avx512_vnni": (("avx512_vnni",), ("avx512vnni",)),
    "avx512_bf16": (("avx512_bf16",), ("avx512bf16",)),
    "amx": (("amx_tile", "amx_bf16", "amx_int8"), ("amx-tile", "amx-bf16", "amx-int8")),
}
LADDER: tuple[Backend, ...] = tuple(_STEPS)


class LayerStruct(ctypes.Structure):
    """One packed weight as the C code sees it; the fields follow ``struct layer`` in few.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("float16", ctypes.c_int64),
        ("integer", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Native:
    """The compiled functions. Each returns 0, -1 without memory, -2 for an index out of range, or -4 where a process does not come."""

    linear: Callable[..., int]
    gather: Callable[..., int]
    decode: Callable[..., int]
    decoder_room: Callable[..., int]
    sparse_few: Callable[..., int]
    sparse_dense: Callable[..., int]
    lstm: Callable[..., int]
    sum: Callable[..., int]
    ticks: Callable[[], int]
    backend: Backend


@dataclass(frozen=True)
class _Choice:
    native: Native | None
    reason: str


def native() -> Native | None:
    """Return the compiled kernels, or None where plain PyTorch has to do. The first call may compile, for some seconds."""
    return _choose().native


def backend() -> Backend:
    """Return the name of the backend that runs here."""
    found = native()
    return "torch" if found is None else found.backend


def explain() -> str:
    """Return the backend with the reason for it, as one sentence for a report."""
    return f"{backend()}: {_choose().reason}"


@lru_cache(maxsize=4096)
def struct_at(
    weight: int,
    scale: int | None,
    rows: int,
    cols: int,
    group: int = 0,
    *,
    float16: bool = False,
    integer: bool = False,
    input_scale: int | None = None,
) -> tuple[LayerStruct, int]:
    """Return the C struct of these addresses and sizes, and its own address. It keeps no tensor alive.

    Args:
        weight: where the weight stands, in the layout of the kernels.
        scale: where float32 scales stand, one a row; None for int4.
        rows: outputs of the layer.
        cols: inputs of the layer.
        group: int4: columns that share a scale.
        float16: int4: scales and points are float16, else bfloat16.
        integer: inputs are rounded to int8.
        input_scale: integer inputs: where their scale stands; None for one a row of the input, found anew.
    """
    struct = LayerStruct(weight, scale, input_scale, rows, cols, group, float16, integer)
    return struct, ctypes.addressof(struct)


def forget() -> None:
    """Choose the backend anew at the next call, after the environment has changed."""
    _choose.cache_clear()
    struct_at.cache_clear()


def refuse_unknown_choice() -> str:
    """Return the backend that the environment asks for.

    Raises:
        OptkitError: ``OPTKIT_KERNELS`` names none.
    """
    wanted = os.environ.get("OPTKIT_KERNELS", "auto")
    choices = ("auto", *reversed(LADDER), "torch")
    if wanted not in choices:
        raise OptkitError(f"OPTKIT_KERNELS is {wanted!r}; use one of {', '.join(choices)}")
    return wanted


@cache
def _choose() -> _Choice:
    wanted = refuse_unknown_choice()
    if wanted == "torch":
        return _Choice(None, "asked for by OPTKIT_KERNELS")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return _Choice(None, f"the kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    best, reason = _highest(cpu_flags(), wanted)
    if best is None:
        return _Choice(None, reason)
    try:
        return _open(best, reason)
    except MissingError as error:
        print(f"optkit: packed layers run in plain PyTorch, slowly: {error}", file=sys.stderr)
        return _Choice(None, str(error))


def _highest(flags: frozenset[str], wanted: str) -> tuple[Backend | None, str]:
    """Return the highest step that the processor reaches, not above the wanted one, and why it is not a higher one."""
    best: Backend | None = None
    for step, (needed, _) in _STEPS.items():
        lacking = sorted(set(needed) - flags)
        if lacking:
            return best, f"this processor has no {', '.join(lacking)}"
        best = step
        if step == wanted:
            return best, "asked for by OPTKIT_KERNELS"
    return best, "all kernels are in use"


def _open(best: Backend, reason: str) -> _Choice:
    library = open_library(tuple(name for step in LADDER[: LADDER.index(best) + 1] for name in _STEPS[step][1]))
    if best == "amx" and library.optkit_request_amx() != 0:
        return _open("avx512_bf16", "the system does not grant AMX to this process")
    address, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.optkit_linear.argtypes = [address, address, address, address, count, flag, flag]
    library.optkit_gather.argtypes = [address, address, address, count, flag]
    library.optkit_decode.argtypes = [address, address, count, count, address, address, flag]
    library.optkit_decoder_room.argtypes = [address, count, flag]
    library.optkit_decoder_room.restype = count
    library.optkit_sparse_few.argtypes = [address, address, address, address, count, flag]
    library.optkit_sparse_dense.argtypes = [address, address, flag]
    library.optkit_lstm.argtypes = [address, count, count, count, flag]
    library.optkit_ticks.argtypes, library.optkit_ticks.restype = [], ctypes.c_uint64
    library.optkit_sum.argtypes = [address, address, count]
    opened = Native(
        library.optkit_linear,
        library.optkit_gather,
        library.optkit_decode,
        library.optkit_decoder_room,
        library.optkit_sparse_few,
        library.optkit_sparse_dense,
        library.optkit_lstm,
        library.optkit_sum,
        library.optkit_ticks,
        backend=best,
    )
    return _Choice(opened, reason)
