"""Rows of CSV, JSONL and Parquet files. A row knows its file and its number, so that whoever finds a fault in it can name the place."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.core.errors import DataError, MissingError

SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a file or a data set; ``number`` counts from 1, in a CSV file by the lines of the file."""

    path: Path | str
    number: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"{self.path} row {self.number}"

    def text(self, column: str) -> str:
        """Return the text of a column.

        Raises:
            DataError: there is none.
        """
        value = self.values.get(column)
        if not isinstance(value, str):
            fields = ", ".join(map(str, self.values))
            raise DataError(f"{self.where} has no text in {column!r}, but {type(value).__name__}; it has {fields}")
        return value

    def label(self, column: str) -> str:
        """Return the class in a column: a text, or a whole number as text.

        Raises:
            DataError: there is none.
        """
        value = self.values.get(column)
        return str(value) if isinstance(value, int) else self.text(column)

    def number_in(self, column: str) -> float:
        """Return the number of a column.

        Raises:
            DataError: it is none, or not finite.
        """
        value = self.values.get(column)
        try:
            found = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found) or isinstance(value, bool):
            raise DataError(f"{self.where} has no number in {column!r}, but {str(value)[:40]!r}")
        return found


def rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a file that must have these columns.

    Raises:
        DataError: a column is missing, a row is broken or not UTF-8 (its number is told), the file cannot be read or is no table.
        MissingError: a Parquet file, without pyarrow.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: files that end in {path.suffix!r} are no tables; use {', '.join(SUFFIXES)}")
    try:
        return list(readers[path.suffix](path, columns))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _refuse_missing(path, columns, reader.fieldnames or [])
        for values in reader:
            extra, short = values.pop(None, None), [name for name, value in values.items() if value is None]
            if extra or short:
                told = f"{len(extra)} fields too many" if extra else f"nothing in {', '.join(short)}"
                raise DataError(f"{path} row {reader.line_num} has {told}; its head has {', '.join(reader.fieldnames or [])}")
            yield Row(path, reader.line_num, values)
    except csv.Error as error:
        raise DataError(f"{path} row {reader.line_num} is no CSV: {error}") from None


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # Only line feeds part rows: JSON texts may hold the other characters that splitlines() would cut at.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} row {number} is no JSON in UTF-8: {error}") from None
        missing = [name for name in columns if not isinstance(values, dict) or name not in values]
        if missing:
            fields = ", ".join(values) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"{path} row {number} has no field {missing[0]!r}; it has {fields}")
        yield Row(path, number, values)


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingError("Parquet files need the package 'pyarrow': pip install 'optkit[hub]'") from None
    try:
        _refuse_missing(path, columns, parquet.read_schema(path).names)
        found: list[dict[str, Any]] = parquet.read_table(path, columns=list(columns)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None
    for number, values in enumerate(found, 1):
        yield Row(path, number, values)


def _refuse_missing(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(names) or 'none'}")
