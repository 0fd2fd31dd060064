"""The door to the compiled kernels: which backend runs here, and why. Without Linux, AVX-512 or a compiler it is plain PyTorch."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from optkit.core.environment import cpu_flags
from optkit.core.errors import MissingError, OptkitError
from optkit.kernels.build import open_library

Backend = Literal["avx512+amx", "avx512", "torch"]

FEW_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
MANY_FLAGS = frozenset({"amx_tile", "amx_bf16"})
MANY_FROM = 6  # from so many rows of input on, tiles are faster than registers (measured from 384 x 384 to 2048 x 2048)
_NEVER = 1 << 62
_CHOICES = ("auto", "avx512", "torch")


class LayerStruct(ctypes.Structure):
    """One packed weight as the C code sees it; the fields follow ``struct layer`` in linear.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("many_from", ctypes.c_int64),
        ("float16", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Native:
    """The compiled functions. Each returns 0, -1 without memory, or -2 for an index out of range."""

    linear: Callable[..., int]
    gather: Callable[..., int]
    decode: Callable[..., int]
    decoder_room: Callable[..., int]
    amx: bool


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
    return "torch" if found is None else "avx512+amx" if found.amx else "avx512"


def explain() -> str:
    """Return the backend with the reason for it, as one sentence for a report."""
    return f"{backend()}: {_choose().reason}"


@lru_cache(maxsize=4096)
def struct_at(weight: int, scale: int | None, rows: int, cols: int, group: int, float16: bool = False) -> tuple[LayerStruct, int]:
    """Return the C struct of these addresses and sizes, and its own address. It keeps no tensor alive.

    ``float16``: scales and points of int4 are float16, else bfloat16.
    """
    found = native()
    struct = LayerStruct(weight, scale, rows, cols, group, MANY_FROM if found is not None and found.amx else _NEVER, float16)
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
    if wanted not in _CHOICES:
        raise OptkitError(f"OPTKIT_KERNELS is {wanted!r}; use one of {', '.join(_CHOICES)}")
    return wanted


@cache
def _choose() -> _Choice:
    wanted = refuse_unknown_choice()
    if wanted == "torch":
        return _Choice(None, "asked for by OPTKIT_KERNELS")
    missing = _missing()
    if missing:
        return _Choice(None, missing)
    try:
        found, reason = _open(wanted)
    except MissingError as error:
        print(f"optkit: packed layers run in plain PyTorch, slowly: {error}", file=sys.stderr)
        return _Choice(None, str(error))
    return _Choice(found, reason)


def _missing() -> str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    lacking = sorted(FEW_FLAGS - cpu_flags())
    return f"this processor has no {', '.join(lacking)}" if lacking else ""


def _open(wanted: str) -> tuple[Native, str]:
    library = open_library()
    address, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.optkit_linear.argtypes = [address, address, address, address, count, flag, flag]
    library.optkit_gather.argtypes = [address, address, address, count, flag]
    library.optkit_decode.argtypes = [address, address, count, count, address, address, flag]
    library.optkit_decoder_room.argtypes = [address, count, flag]
    library.optkit_decoder_room.restype = count
    functions = (library.optkit_linear, library.optkit_gather, library.optkit_decode, library.optkit_decoder_room)
    lacking = sorted(MANY_FLAGS - cpu_flags())
    if wanted == "avx512":
        reason = "AMX is left out by OPTKIT_KERNELS"
    elif lacking:
        reason = f"this processor has no {', '.join(lacking)}"
    elif library.optkit_request_amx() != 0:
        reason = "the system does not grant AMX to this process"
    else:
        return Native(*functions, amx=True), "all kernels are in use"
    return Native(*functions, amx=False), reason
