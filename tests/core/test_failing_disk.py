"""Every call to the operating system fails in turn, for several reasons: what was there stays, and nothing half-made bears a final name."""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from optkit.core import files
from optkit.core.errors import PlaceError, ResourceError

CALLS: list[tuple[Any, str]] = [
    (os, "open"),
    (os, "fsync"),
    (os, "replace"),
    (pathlib.Path, "open"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "rename"),
    (pathlib.Path, "iterdir"),
]
NUMBERS = [errno.ENOSPC, errno.EROFS, errno.EACCES]
OLD, NEW = "old " * 1000, "new " * 1000


class FailingWrites:
    """A file whose ``write`` counts as a call, and leaves half of the bytes when it fails."""

    def __init__(self, file: Any, count: Callable[[], None]) -> None:
        self._file, self._count = file, count

    def write(self, data: Any) -> int:
        try:
            self._count()
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FailingWrites:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def failing(at: int, number: int) -> Iterator[list[str]]:
    """Let the call number ``at`` fail; yield the calls made so far."""
    made: list[str] = []

    def count(name: str) -> None:
        made.append(name)
        if len(made) == at:
            raise OSError(number, os.strerror(number))

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count(name)
            result = real(*args, **kwargs)
            writes = name == "Path.open" and "w" in str(args[1:])
            return FailingWrites(result, lambda: count("write")) if writes else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, counted(f"{owner.__name__}.{name}", getattr(owner, name)))
        yield made


def write_file(folder: Path) -> None:
    files.write_text(folder / "report.json", NEW)


def build_folder(folder: Path) -> None:
    with files.build_folder(folder / "sub" / "artefact") as aside:
        with (aside / "model.safetensors").open("wb") as file:
            file.write(b"w" * 1000)
        files.write_json(aside / "optkit.json", {"schema": 1})


def make_folder(folder: Path) -> None:
    files.new_folder(folder / "runs")


def look_at_file(folder: Path, succeeded: bool) -> None:
    text = (folder / "report.json").read_text()
    assert text == NEW if succeeded else text in (OLD, NEW)


def look_at_folder(folder: Path, succeeded: bool) -> None:
    place = folder / "sub" / "artefact"
    assert place.exists() or not succeeded
    if place.exists():
        assert set(files.verify(place)["files"]) == {"model.safetensors", "optkit.json"}


def look_at_runs(folder: Path, succeeded: bool) -> None:
    runs = folder / "runs"
    assert [path.name for path in runs.iterdir()] == ["0001"] if succeeded else not runs.exists() or not any(runs.iterdir())


@pytest.mark.parametrize("number", NUMBERS, ids=[errno.errorcode[number] for number in NUMBERS])
@pytest.mark.parametrize(
    ("act", "look"),
    [(write_file, look_at_file), (build_folder, look_at_folder), (make_folder, look_at_runs)],
    ids=["write_text", "build_folder", "new_folder"],
)
def test_any_call_may_fail_and_nothing_is_lost(
    tmp_path: Path, act: Callable[[Path], None], look: Callable[[Path, bool], None], number: int
) -> None:
    failed: list[str] = []
    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        (folder / "report.json").write_text(OLD)
        with failing(at, number) as made:
            try:
                act(folder)
                succeeded = True
            except (PlaceError, ResourceError) as error:
                assert error.exit_code == (4 if number == errno.ENOSPC else 2)
                assert str(folder) in str(error)
                succeeded = False
        look(folder, succeeded)
        assert [path for path in folder.rglob("*.aside*") if path.exists()] == []
        if act is not write_file:
            assert (folder / "report.json").read_text() == OLD
        if len(made) < at:
            assert succeeded
            break
        failed.append(made[at - 1])
    assert len(failed) >= 2
    assert len(made) == len(failed)


def test_the_loop_really_meets_every_kind_of_call(tmp_path: Path) -> None:
    with failing(0, 0) as made:
        build_folder(tmp_path)
        make_folder(tmp_path)
        write_file(tmp_path)
    assert {f"{owner.__name__}.{name}" for owner, name in CALLS} | {"write"} == set(made)
