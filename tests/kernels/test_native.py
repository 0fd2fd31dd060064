from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optkit.core.errors import OptkitError
from optkit.kernels import native
from optkit.kernels.int8 import Int8Linear


@pytest.fixture(autouse=True)
def choose_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OPTKIT_KERNELS", raising=False)
    native.forget()
    yield
    monkeypatch.undo()
    native.forget()


def test_the_backend_is_named_with_its_reason() -> None:
    assert native.explain().startswith(f"{native.backend()}: ")
    assert (native.native() is None) == (native.backend() == "torch")


def test_the_fallback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_KERNELS", "torch")
    assert native.backend() == "torch"
    assert native.explain() == "torch: asked for by OPTKIT_KERNELS"


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_KERNELS", "cuda")
    with pytest.raises(OptkitError, match="'cuda'; use one of auto, amx, avx512_bf16, avx512_vnni, avx512, avx2, torch"):
        native.native()


def test_a_processor_gets_the_highest_step_that_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    found = {
        "none": native._highest(frozenset({"avx2", "fma"}), "auto"),
        "avx2": native._highest(frozenset(avx2 | {"avx512f", "avx512_vnni"}), "auto"),
        "avx512": native._highest(frozenset(avx512 | {"amx_tile"}), "auto"),
        "all": native._highest(frozenset(avx512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}), "auto"),
        "asked": native._highest(frozenset(avx512 | {"avx512_vnni"}), "avx2"),
        "too high": native._highest(frozenset(avx2), "avx512"),
    }
    assert found == {
        "none": (None, "this processor has no f16c"),
        "avx2": ("avx2", "this processor has no avx512bw, avx512dq, avx512vl"),
        "avx512": ("avx512", "this processor has no avx512_vnni"),
        "all": ("amx", "all kernels are in use"),
        "asked": ("avx2", "asked for by OPTKIT_KERNELS"),
        "too high": ("avx2", "this processor has no avx512bw, avx512dq, avx512f, avx512vl"),
    }


def test_without_a_compiler_it_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if native.native() is None:
        pytest.skip(native.explain())
    native.forget()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.backend() == "torch"
    assert "no C compiler" in native.explain() and "no C compiler" in capsys.readouterr().err
    assert Int8Linear.from_weight(torch.randn(4, 8))(torch.randn(2, 8)).shape == (2, 4)


def test_the_kernels_share_the_threads_of_torch(native_only: None) -> None:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line or "libiomp" in line]
    assert len({line.split()[-1] for line in lines if "scikit_learn" not in line}) == 1  # it brings its own, for tests that compare with it


def test_first_calls_from_many_threads_agree(native_only: None) -> None:
    layer = Int8Linear.from_weight(torch.randn(64, 64))
    x = torch.randn(1, 64)
    expected = x @ layer.weight.T
    results: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 8
    for result in results:
        torch.testing.assert_close(result, expected)
