from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optkit.core.errors import MissingError
from optkit.kernels import build, native


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_only: None) -> Path:
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }")
    monkeypatch.setattr(build, "SOURCES", (source,))
    folder = tmp_path / "cache"
    monkeypatch.setenv("OPTKIT_CACHE", str(folder))
    return folder


def test_the_library_is_compiled_once_and_found_again(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.open_library(()).answer() == 42
    assert capsys.readouterr().err.count("\n") == 1
    (kept,) = own_cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    build.open_library(())
    assert capsys.readouterr().err == ""
    assert kept.stat().st_mtime_ns == stamp
    assert own_cache.stat().st_mode & 0o077 == 0


def test_a_broken_library_in_the_cache_is_made_anew(own_cache: Path) -> None:
    own_cache.mkdir(mode=0o700)
    broken = own_cache / f"kernels-{build._key(build._compiler('CC', 'cc'), build.SOURCES, build._COMPILE, ('-shared',))}.so"
    broken.write_bytes(b"no library")
    build.open_library(())
    assert broken.read_bytes()[:4] == b"\x7fELF"


def test_other_instruction_sets_are_another_library(own_cache: Path) -> None:
    build.open_library(())
    build.open_library(("avx2",))
    assert len(list(own_cache.iterdir())) == 2


def test_a_folder_that_others_can_write_is_not_used(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert build.cache_folder() is None
    build.open_library(())
    assert "for this process alone" in capsys.readouterr().err
    assert not list(own_cache.iterdir())


def test_a_failing_compiler_gives_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'fatal error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(MissingError, match=r"cannot compile small\.c: fatal error: out of luck"):
        build.open_library(())
    native.forget()
    assert "out of luck" in native.explain()


def test_several_processes_may_compile_at_once(own_cache: Path) -> None:
    use = f"build.SOURCES = (pathlib.Path({str(build.SOURCES[0])!r}),); print(build.open_library(()).answer())"
    script = f"import pathlib; from optkit.kernels import build; {use}"
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[2])}
    runs = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["42"] * 4
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]
