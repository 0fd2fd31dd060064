"""The folder of one run: its own number, its lock, its finished stages. Nothing in it counts as a result before the manifest is there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from optkit.core import files
from optkit.core.errors import OptkitError

_INPUTS = "inputs.json"


class RunFolder:
    """A run in progress. ``work`` holds what only a resumed run needs; it goes when the run is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / "work"
        self._lock: int | None = None

    @classmethod
    def new(cls, parent: Path, inputs: dict[str, Any]) -> RunFolder:
        """Make a folder that nobody else has.

        Raises:
            ResourceError: the disk is full.
            PlaceError: it cannot be written.
        """
        folder = cls(files.new_folder(parent))
        with files.refusals(folder.path):
            folder.work.mkdir(mode=0o700)
        folder._take()
        with folder._freed_on_failure():
            files.write_json(folder.work / _INPUTS, inputs)
        return folder

    @classmethod
    def resumed(cls, parent: Path, inputs: dict[str, Any]) -> RunFolder:
        """Return the latest unfinished run under ``parent``.

        Raises:
            OptkitError: there is none, all are being worked on, or the latest was made from other inputs; these are named.
        """
        numbers = sorted((p for p in parent.glob("[0-9]*") if (p / "work" / _INPUTS).exists() and not files.is_sealed(p)), reverse=True)
        if not numbers:
            raise OptkitError(f"{parent} has no unfinished run; leave --resume out to begin one")
        for path in numbers:
            folder = cls(path)
            if folder._take(wait=False):
                with folder._freed_on_failure():
                    folder._refuse_changed(inputs)
                    folder._sweep()
                return folder
        raise OptkitError(f"all unfinished runs in {parent} are being worked on by other processes")

    def has(self, name: str) -> bool:
        """Say whether a stage is finished."""
        return (self.work / f"{name}.json").exists()

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a stage: the one that is kept, or a new one. Results are plain JSON."""
        path = self.work / f"{name}.json"
        if self.has(name):
            return files.read_json(path)
        shutil.rmtree(self.work / name, ignore_errors=True)  # of a stage that was interrupted before its result was written
        result = make()
        files.write_json(path, result)
        return result

    def keep_artefact(self, name: str) -> None:
        """Move an artefact out of the work folder, unless that is done."""
        if (self.work / name).exists():
            with files.refusals(self.path):
                (self.work / name).rename(self.path / "artefact")

    def finish(self) -> None:
        """Seal the result, and only then remove what a resumed run would need. The artefact is sealed by itself."""
        files.seal(self.path, without=(self.work.name, "artefact"))
        shutil.rmtree(self.work)

    def _refuse_changed(self, inputs: dict[str, Any]) -> None:
        before = _flat(files.read_json(self.work / _INPUTS))
        now = _flat(inputs)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            told = "\n  ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
            raise OptkitError(
                f"{self.path} cannot go on, because its inputs have changed:\n  {told}\nleave --resume out to begin a new run"
            )

    def _take(self, wait: bool = True) -> bool:
        """Lock the folder; the system frees the lock when this process ends, however it ends."""
        try:
            with files.refusals(self.work):
                handle = os.open(self.work / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # finished by another process just now
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        if files.is_sealed(self.path):
            self._free()
            return False
        return True

    def _sweep(self) -> None:
        """Remove what a killed process has left of files and folders it was still writing."""
        for left in (*self.work.glob(".*"), *self.path.glob(".*.aside")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    @contextmanager
    def _freed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._free()
            raise

    def _free(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OptkitError) and error.exit_code == OptkitError.exit_code and not self._has_results():
            shutil.rmtree(self.path, ignore_errors=True)  # refused: there is nothing that could go on
        self._free()

    def _has_results(self) -> bool:
        return any(path.name != _INPUTS for path in self.work.glob("*.json"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: item for name, part in value.items() for key, item in _flat(part, f"{path}.{name}" if path else str(name)).items()}
    if isinstance(value, list) and value:
        return {key: item for index, part in enumerate(value) for key, item in _flat(part, f"{path}[{index}]").items()}
    return {path: value}
