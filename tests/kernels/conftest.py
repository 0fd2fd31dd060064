"""The backends that this machine has, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optkit.kernels import native

EMULATED = "emulated_amx"


@pytest.fixture(params=[*reversed(native.LADDER), EMULATED, "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test on every backend; those that are not here are skipped. Where there is no AMX, plain C stands in for its tiles."""
    if request.param == EMULATED:
        _emulate_tiles(monkeypatch)
    monkeypatch.setenv("OPTKIT_KERNELS", "amx" if request.param == EMULATED else request.param)
    native.forget()
    found = native.backend()
    if found != ("amx" if request.param == EMULATED else request.param):
        monkeypatch.undo()
        pytest.skip(native.explain())
    yield found
    monkeypatch.undo()
    native.forget()


def _emulate_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = native.cpu_flags()
    if "amx_tile" in flags or "avx512_bf16" not in flags:
        pytest.skip("the tiles themselves are tested here, or AVX512-BF16 is missing")
    monkeypatch.setattr(native, "cpu_flags", lambda: flags | {"amx_tile", "amx_bf16", "amx_int8"})
    monkeypatch.setenv("CC", f"gcc -include {Path(__file__).parent / 'emulated_tiles.h'}")


@pytest.fixture(autouse=True)
def seed_and_threads() -> Iterator[None]:
    """Make random inputs the same in every run, and give the threads back."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run on the best backend; skip where it is plain PyTorch."""
    monkeypatch.setenv("OPTKIT_KERNELS", "auto")
    native.forget()
    if native.native() is None:
        pytest.skip(native.explain())
    yield
    monkeypatch.undo()
    native.forget()
