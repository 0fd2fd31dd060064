"""Compiles the kernels once with the system compiler and keeps the library in a cache of this user. Compiles nothing but our own source."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from optkit.core.cache import cache_folder
from optkit.core.errors import MissingError, PlaceError, ResourceError
from optkit.core.files import write_bytes

_HERE = Path(__file__).parent
SOURCES = (_HERE / "linear.c", _HERE / "decode.c", _HERE / "sparse.c", _HERE / "lstm.c", _HERE / "peers.c")
OPERATOR = _HERE / "operator.cpp"
HEADERS = tuple(
    _HERE / f"{name}.h"
    for name in ("lanes", "call", "nibbles", "few", "panels", "integers", "pairs", "tiles", "decoder", "attention", "peers")
)
# The library is linked without an OpenMP runtime of its own: it finds the one that torch has loaded, and so shares torch's threads.
_COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-c")
_TIMEOUT_S = 180


def open_library(features: tuple[str, ...]) -> ctypes.CDLL:
    """Return the loaded kernels, compiled first where this has not been done before.

    Several processes may do so at once: each compiles aside and renames. Without a cache that can be written, nothing is kept.

    Args:
        features: the instruction sets to compile for, as the compiler's ``-m`` options name them.

    Raises:
        MissingError: there is no compiler, it failed, or its product cannot be loaded; the message is the reason.
    """
    compiler = _compiler("CC", "cc", "gcc")
    return _open(compiler, SOURCES, (*_COMPILE, *(f"-m{feature}" for feature in features)), ("-shared",), "kernels")


def open_operator(torch_folder: Path, torch_version: str) -> ctypes.CDLL:
    """Return the library with the operator of PyTorch; loading it registers the operator.

    Raises:
        MissingError: there is no C++ compiler, or this version of PyTorch has other headers; the message is the reason.
    """
    compiler = _compiler("CXX", "c++", "g++")
    include = ("-I", str(torch_folder / "include"), "-I", str(_HERE), "-mavx2", "-mfma", "-mf16c", f'-DOPTKIT_TORCH="{torch_version}"')
    flags = ("-O2", "-std=c++20", "-fPIC", "-c", *include)
    return _open(compiler, (OPERATOR,), flags, ("-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"), "operator")


def _open(compiler: list[str], sources: tuple[Path, ...], flags: tuple[str, ...], link: tuple[str, ...], what: str) -> ctypes.CDLL:
    folder = cache_folder()
    name = f"{what}-{_key(compiler, sources, flags, link)}.so"
    if folder is not None and (folder / name).is_file():
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:
            (folder / name).unlink(missing_ok=True)
    span = "once for this machine" if folder else "for this process alone, because the cache folder cannot be written or is open to others"
    print(f"optkit: compiling the {what}, {span}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="optkit-") as aside:
        built = _compile(compiler, sources, flags, link, Path(aside))
        path = built if folder is None else _keep(built, folder / name)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingError(f"the compiled {what} cannot be loaded: {error}") from None


def _compiler(variable: str, *usual: str) -> list[str]:
    for command in (shlex.split(os.environ.get(variable, "")), *([name] for name in usual)):
        if command and shutil.which(command[0]):
            return command
    raise MissingError(f"no {'C' if variable == 'CC' else 'C++'} compiler is here (looked for ${variable}, {' and '.join(usual)})")


def _key(compiler: list[str], sources: tuple[Path, ...], flags: tuple[str, ...], link: tuple[str, ...]) -> str:
    version = _run([*compiler, "--version"], "say its version")
    parts = (*(path.read_text() for path in (*sources, *HEADERS)), *flags, *link, *compiler, version, platform.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: list[str], sources: tuple[Path, ...], flags: tuple[str, ...], link: tuple[str, ...], aside: Path) -> Path:
    units, library = [aside / f"{source.stem}.o" for source in sources], aside / "library.so"
    for source, unit in zip(sources, units, strict=True):
        _run([*compiler, *flags, str(source), "-o", str(unit)], f"compile {source.name}")
    _run([*compiler, *map(str, units), *link, "-o", str(library)], "link the library")
    return library


def _keep(built: Path, place: Path) -> Path:
    try:
        write_bytes(place, built.read_bytes())
    except (PlaceError, ResourceError) as error:
        print(f"optkit: what was compiled is not kept: {error}", file=sys.stderr)
        return built
    return place


def _run(command: list[str], purpose: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"the compiler {command[0]!r} cannot {purpose}: {error}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise MissingError(f"the compiler {command[0]!r} cannot {purpose}: {lines[0].strip()}")
    return done.stdout
