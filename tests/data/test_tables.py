"""Rows of tables, and faults told by file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optkit.core.errors import DataError
from optkit.data.tables import rows


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


TABLE = [{"text": 'a "quoted", text\nof two lines', "label": "x"}, {"text": "\u2028 é", "label": "y"}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_three_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    found = rows(write(tmp_path / f"a{suffix}", TABLE), ("text", "label"))
    assert [(row.text("text"), row.label("label")) for row in found] == [(row["text"], row["label"]) for row in TABLE]
    with pytest.raises(DataError, match=rf"a{suffix}.* has no (column|field) 'body'; it has text, label"):
        rows(tmp_path / f"a{suffix}", ("text", "body"))


def test_a_csv_file_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\na,b\r\n")
    assert rows(tmp_path / "a.csv", ("text", "label"))[0].values == {"text": "a", "label": "b"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"text,label\na,b\nc\n", "row 3 has nothing in label; its head has text, label"),
        (b"text,label\na,b,c\n", "row 2 has 1 fields too many"),
        (b'text,label\n"a,b\n', "is no CSV"),
        (b"", "has no column 'text'; it has none"),
        (b"text,label\n\xff,b\n", "a.csv is not UTF-8 text: byte 11 is 0xff"),
    ],
)
def test_a_broken_csv_file_is_told_by_row(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=told):
        rows(tmp_path / "a.csv", ("text", "label"))


def test_what_is_no_number_is_told_by_row(tmp_path: Path) -> None:
    table = [{"close": value} for value in (1, 2.5, "3e1", None, True, "x", float("nan"))]
    found = rows(write(tmp_path / "a.jsonl", table), ("close",))
    assert [row.number_in("close") for row in found[:3]] == [1, 2.5, 30]
    for row in found[3:]:
        with pytest.raises(DataError, match=rf"a.jsonl row {row.number} has no number in 'close'"):
            row.number_in("close")


def test_other_files_are_refused_with_those_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.xls").touch()
    with pytest.raises(DataError, match=r"'.xls' are no tables; use .csv, .jsonl, .parquet"):
        rows(tmp_path / "a.xls", ("text",))
    with pytest.raises(DataError, match=r"b.csv cannot be read: No such file"):
        rows(tmp_path / "b.csv", ("text",))
