"""The next days of a series, from those before. What must be beaten is the forecast that nothing changes."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.data.documents import files_of
from optkit.data.series import csv_series, stock_prices, windows
from optkit.data.sides import Side, Sides, Window
from optkit.tasks.supervised import Examples, Supervised, logits_of

Days = Annotated[int, Field(ge=1, le=100_000)]


class SeriesFile(Settings):
    """A CSV, JSONL or Parquet file with a row a day."""

    file: str = Field(description="path")
    date: str = Field(default="date", description="column with the date, such as 2024-01-31")
    values: tuple[str, ...] = Field(min_length=1, description="columns to forecast")


class Forecasting(Supervised):
    """Errors of the forecast in the series' own unit. Sides follow one another in time; the scale is that of the training side alone."""

    corpus: Literal["stock"] | SeriesFile = Field(default="stock", description="'stock' are the daily prices that come with matplotlib")
    window: Days = Field(default=32, description="days that are seen")
    horizon: Days = Field(default=5, description="days that are forecast")

    def read(self) -> Sides[Window]:
        """Return the stretches of the series."""
        if isinstance(self.corpus, str):
            found = stock_prices()
        else:
            found = csv_series(files_of([self.corpus.file])[0], self.corpus.date, self.corpus.values)
        return windows(*found, self.window, self.horizon)

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (channels,) of the training side."""
        seen = torch.tensor([item.values for item in self.sides.training], dtype=torch.float64).flatten(0, 1)
        return seen.mean(0).float(), seen.std(0).clamp_min(1e-12).float()

    @property
    def item_positions(self) -> int:
        """The days that are seen."""
        return self.window

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the number of series, and of days seen and forecast."""
        channels = len(self.sides.training[0].values[0])
        return {"per": "window", "channels": channels, "window": self.window, "horizon": self.horizon}

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return scaled values (items, window, channels) and those that follow (items, horizon, channels)."""
        mean, deviation = self.scale
        values = (torch.tensor([item.values for item in self.sides.of(side)]) - mean) / deviation
        return Examples({"values": values[:, : self.window].contiguous()}, values[:, self.window :].contiguous())

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the mean squared error, scaled."""
        return functional.mse_loss(logits_of(output).float(), answers)

    def judge(self, output: Any, answers: Tensor) -> dict[str, Tensor]:
        """Return the forecast, scaled, and its mean squared and absolute error in the series' own unit."""
        given = logits_of(output).float()
        off = (given - answers) * self.scale[1]
        return {"answer": given.flatten(1), "squares": off.square().flatten(1).mean(1), "sizes": off.abs().flatten(1).mean(1)}

    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return the last value seen, for every day to come."""
        found = self.examples("evaluation", tokenizer)
        last = found.inputs["values"][:, -1:].expand(-1, self.horizon, -1)
        return "the last value, unchanged", {name: column.double().numpy() for name, column in self.judge(last, found.answers).items()}

    def metrics(self) -> tuple[Metric, ...]:
        """Root of the mean squared error first."""
        return (
            Metric("rmse", "", False, lambda c: np.sqrt(c["squares"].mean(-1)), lambda c: np.sqrt(c["squares"])),
            Metric("mse", "", False, lambda c: c["squares"].mean(-1), lambda c: c["squares"]),
            Metric("mae", "", False, lambda c: c["sizes"].mean(-1), lambda c: c["sizes"]),
        )
