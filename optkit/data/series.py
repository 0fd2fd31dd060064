"""Series of numbers by date: daily stock prices that come with matplotlib, or CSV files. Sides follow one another in time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path

import numpy as np

from optkit.core.errors import DataError
from optkit.core.measurement import Array
from optkit.data import tables
from optkit.data.sides import SIDES, Side, Sides, Window

_ENDS: dict[Side, float] = {"training": 0.65, "validation": 0.72, "calibration": 0.80, "evaluation": 1.0}


def stock_prices() -> tuple[str, list[date], Array]:
    """Return the name, the days and the closing prices (days, 1) of Google's share from 2004 to 2008, from matplotlib's sample data."""
    from matplotlib import cbook

    with np.load(cbook.get_sample_data("goog.npz", asfileobj=False)) as found:  # its arrays are plain numbers: no pickle
        table = found["price_data"]
    return "goog", [day.astype("datetime64[D]").item() for day in table["date"]], table["close"].astype(np.float64)[:, None]


def csv_series(path: Path, day: str, values: Sequence[str]) -> tuple[str, list[date], Array]:
    """Return the name, the days and the values (days, channels) of a file, sorted by day.

    Raises:
        DataError: a row has no date or no number, a day stands there twice, or a value never changes.
    """
    rows = tables.rows(path, (day, *values))
    found: dict[date, tuple[tables.Row, list[float]]] = {}
    for row in rows:
        when = _date(row, day)
        if when in found:
            raise DataError(f"{row.where} has the date {when} again, which stands in row {found[when][0].number}")
        found[when] = row, [row.number_in(name) for name in values]
    days = sorted(found)
    table = np.array([found[when][1] for when in days], dtype=np.float64).reshape(len(days), len(values))
    constant = [name for name, column in zip(values, table.T, strict=True) if len(days) and np.ptp(column) == 0]
    if constant:
        raise DataError(f"{path}: {constant[0]!r} is {table[0, values.index(constant[0])]:g} on every day; there is nothing to forecast")
    return path.name, days, table


def windows(name: str, days: Sequence[date], table: Array, window: int, horizon: int) -> Sides[Window]:
    """Return all stretches of ``window`` + ``horizon`` days; none reaches over the end of its side.

    Raises:
        DataError: a side is too short for one.
    """
    sides: Sides[Window] = Sides(name)
    ends = [0, *(int(len(days) * _ENDS[side]) for side in _ENDS)]
    for side, start, end in zip(_ENDS, ends, ends[1:], strict=False):
        for first in range(start, end - window - horizon + 1):
            values = tuple(map(tuple, table[first : first + window + horizon].tolist()))
            sides.of(side).append(Window(days[first].isoformat(), values))
    short = [side for side in SIDES if not sides.of(side)]
    if short:
        raise DataError(
            f"{name} has {len(days)} days, and {window} + {horizon} days do not fit into those for {short[0]}; give more, or ask for less"
        )
    return sides


def _date(row: tables.Row, column: str) -> date:
    value = row.values.get(column)
    if isinstance(value, date):
        return value.date() if isinstance(value, datetime) else value
    try:
        return datetime.fromisoformat(str(value)).date()
    except ValueError:
        raise DataError(f"{row.where} has no date in {column!r}, but {str(value)[:40]!r}; expected such as 2024-01-31") from None
