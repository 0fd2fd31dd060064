"""The backends that this machine has, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optkit.kernels import native


@pytest.fixture(params=["auto", "avx512", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test on every backend; those that are not here are skipped."""
    monkeypatch.setenv("OPTKIT_KERNELS", request.param)
    native.forget()
    if request.param != "torch" and native.native() is None:
        pytest.skip(native.explain())
    yield native.backend()
    monkeypatch.undo()
    native.forget()


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
