"""Data sets of the Hugging Face Hub, through the package ``datasets``. Where the Hub cannot be reached, that is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optkit.core.errors import DataError, MissingError
from optkit.data.tables import Row


def load_split(name: str, subset: str | None, split: str) -> Any:
    """Return one split of a data set.

    Raises:
        MissingError: the package ``datasets`` is not installed, or the Hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise MissingError("a corpus from the Hub needs the package 'datasets': pip install 'optkit[hub]'") from None
    try:
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:
        raise MissingError(f"corpus: data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def refuse_missing(name: str, split: Any, columns: Sequence[str]) -> None:
    """Refuse a data set without these columns.

    Raises:
        DataError: with the columns that it has.
    """
    missing = [column for column in columns if column not in split.column_names]
    if missing:
        raise DataError(f"corpus: data set {name!r} has no column {missing[0]!r}; it has {', '.join(split.column_names)}")


def hub_rows(name: str, subset: str | None, split: str, columns: Sequence[str], most: int) -> list[Row]:
    """Return rows of a data set, drawn evenly where it has more than are asked for: many are sorted by class.

    Raises:
        MissingError: the package ``datasets`` is not installed, or the Hub cannot be reached.
        DataError: a column is missing.
    """
    found = load_split(name, subset, split)
    refuse_missing(name, found, columns)
    step = max(1, -(-len(found) // most))
    return [Row(name, number + 1, found[number]) for number in range(0, len(found), step)]
