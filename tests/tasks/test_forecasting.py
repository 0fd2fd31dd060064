"""Series by date: sides that follow one another in time, scaled by the past alone, and faults told by row."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optkit.core.errors import DataError
from optkit.data.series import stock_prices
from optkit.data.sides import SIDES
from optkit.tasks.forecasting import Forecasting, SeriesFile

Rows = list[list[Any]]


def rows(count: int = 300) -> Rows:
    return [[(date(2020, 1, 1) + timedelta(n)).isoformat(), f"{math.sin(n / 9) * 5 + n / 10:.6f}"] for n in range(count)]


def own(path: Path, table: Rows, head: tuple[str, ...] = ("date", "close"), **sizes: int) -> Forecasting:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *table])
    return Forecasting(corpus=SeriesFile(file=str(path), values=("close",)), **({"window": 8, "horizon": 3} | sizes))


@pytest.mark.parametrize("bundled", [True, False])
def test_no_day_of_one_side_is_seen_in_another(tmp_path: Path, bundled: bool) -> None:
    task = Forecasting() if bundled else own(tmp_path / "a.csv", rows())
    days = [day.isoformat() for day in stock_prices()[1]] if bundled else [row[0] for row in rows()]
    for before, after in itertools.pairwise(SIDES):
        last = days.index(task.sides.of(before)[-1].begins) + task.window + task.horizon - 1
        assert last < days.index(task.sides.of(after)[0].begins)
    mean, deviation = task.scale
    seen = np.array([item.values for item in task.sides.training])
    assert torch.allclose(mean, torch.tensor(seen.mean((0, 1))).float()) and (deviation > 0).all()


def test_rows_in_any_order_make_the_same_series(tmp_path: Path) -> None:
    assert own(tmp_path / "a.csv", rows()[::-1]).sides.evaluation == own(tmp_path / "b.csv", rows()).sides.evaluation


def test_the_last_value_unchanged_has_the_error_that_numpy_finds(tmp_path: Path) -> None:
    task = own(tmp_path / "a.csv", rows())
    name, columns = task.trivial(None)
    values = np.array([item.values for item in task.sides.evaluation])[..., 0]
    off = values[:, 8:] - values[:, 7:8]
    found = {metric.name: float(metric.estimate({key: column[None] for key, column in columns.items()})[0]) for metric in task.metrics()}
    assert "last value" in name
    assert found["mae"] == pytest.approx(np.abs(off).mean(), rel=1e-4)
    assert found["mse"] == pytest.approx((off**2).mean(), rel=1e-4)
    assert found["rmse"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: [[day, "7"] for day, _ in table], "'close' is 7 on every day; there is nothing to forecast"),
        (lambda table: [*table[:4], ["soon", "1"], *table[4:]], "a.csv row 6 has no date in 'date', but 'soon'"),
        (lambda table: [*table[:4], [table[9][0], ""], *table[10:]], "a.csv row 6 has no number in 'close', but ''"),
        (lambda table: [*table, table[0]], "row 302 has the date 2020-01-01 again, which stands in row 2"),
        (lambda table: table[:40], "40 days, and 8 [+] 3 days do not fit into those for validation"),
        (lambda table: [], "0 days"),
    ],
    ids=["constant", "no date", "no number", "twice", "short", "empty"],
)
def test_series_that_cannot_be_forecast_are_refused(tmp_path: Path, change: Callable[[Rows], Rows], told: str) -> None:
    with pytest.raises(DataError, match=told):
        own(tmp_path / "a.csv", change(rows())).look()


def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'date'; it has day, price"):
        own(tmp_path / "a.csv", rows(), head=("day", "price")).look()
