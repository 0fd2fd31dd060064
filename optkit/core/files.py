"""The one door for durable writes: aside, flushed to disk, renamed. A manifest with digests comes last; without it there is no result."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optkit.core.errors import ArtefactError, OptkitError, PlaceError, ResourceError

MANIFEST = "manifest.json"
_PLAIN_LISTS = re.compile(r"\[\n\s*([-+.\w]+(?:,\n\s*[-+.\w]+)*)\n\s*\]")  # strings have quotes, and no line ends


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or not there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there.

    Raises:
        ResourceError: the disk is full.
        PlaceError: it is read-only or forbidden for this user.
    """
    with refusals(path):
        aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write what :func:`json_text` makes of a value."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Return JSON, a line for each entry, but one for a whole list of numbers; NaN is refused, because it is no JSON.

    Bytes of a path that are no UTF-8 become escapes.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return _PLAIN_LISTS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtefactError: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from None


@contextmanager
def build_folder(path: Path, manifest: str = MANIFEST) -> Iterator[Path]:
    """Yield a folder aside, to be filled; on success seal it with a manifest and rename it to ``path`` in one step.

    Raises:
        ArtefactError: ``path`` exists and is not an empty folder.
        ResourceError: the disk is full.
        PlaceError: it is read-only or forbidden for this user.
    """
    with refusals(path):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ArtefactError(f"{path} exists already and is not overwritten; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700)
        try:
            yield aside
            seal(aside, manifest)
            aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _sync_folder(path.parent)


def new_folder(parent: Path) -> Path:
    """Make and return a folder under ``parent`` that nobody else has: the next free four-digit number."""
    with refusals(parent):
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()), default=0)
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
                return parent / f"{number:04d}"
            except FileExistsError:
                number += 1


def seal(folder: Path, manifest: str = MANIFEST, without: Iterable[str] = ()) -> None:
    """Flush every file of the folder to disk and write their digests last, into the manifest.

    ``without`` names entries of the folder that are no part of what is sealed.
    A JSON object that stands in the manifest's place already is kept; the digests are added under ``files``.
    """
    note = read_json(folder / manifest) if (folder / manifest).exists() else {"schema": 1}
    files = {}
    left_out = tuple(without)
    for path in sorted(_files(folder, manifest)):
        if path.relative_to(folder).parts[0] in left_out:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"sha256": digest(path), "size": path.stat().st_size}
    write_json(folder / manifest, {**note, "files": files})


def verify(folder: Path, manifest: str = MANIFEST) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises:
        ArtefactError: the manifest is missing, or a file is missing or changed; all of them are named.
    """
    if not folder.is_dir():
        raise ArtefactError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
    if not (folder / manifest).is_file():
        raise ArtefactError(f"{folder} has no {manifest}: it is not a finished result")
    content = read_json(folder / manifest)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ArtefactError(f"{folder / manifest} lists no files: it is not a manifest")
    wrong = []
    for name, entry in content["files"].items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ArtefactError(f"{folder / manifest} has no size and digest for {name}: it is damaged")
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtefactError(f"{folder / manifest} lists {name}, which lies outside the folder: it is not what was written")
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry["size"] or digest(path) != entry["sha256"]:
            wrong.append(f"{name}: changed")
    if wrong:
        raise ArtefactError(f"{folder} is not what was written:\n  " + "\n  ".join(wrong))
    return content


def is_sealed(folder: Path, manifest: str = MANIFEST) -> bool:
    """Say whether the folder has a manifest, without reading the files."""
    return (folder / manifest).is_file()


def digest(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def refusals(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one clear error that names the place."""
    try:
        yield
    except Exception as error:  # libraries written in Rust raise kinds of their own, with the system's number in the text
        number = _system_number(error)
        if number in _SPENT:
            raise ResourceError(f"cannot write {place}: {_SPENT[number]}; free space or choose another folder with --out") from None
        if number in _CLOSED:
            raise PlaceError(f"cannot write {place}: {_CLOSED[number]}; choose another folder with --out") from None
        raise


_SPENT = {
    errno.ENOSPC: "the disk is full",
    errno.EFBIG: "the file would be larger than allowed",
    errno.EDQUOT: "the disk quota is used up",
    errno.EMFILE: "too many open files",
}
_CLOSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "a file is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}


def _system_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = None if isinstance(error, OptkitError) else re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _files(folder: Path, manifest: str) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / manifest:
            yield path


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
