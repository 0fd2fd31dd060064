"""The text of a file, or a refusal that names it."""

from __future__ import annotations

from pathlib import Path

from optkit.core.errors import DataError


def text_of(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file, without their ends; only line feeds part them.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    return text_of(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
