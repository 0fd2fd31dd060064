"""An LSTM that reads a stretch of a series, and one that writes its continuation, as changes to the last value seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.models.networks.contract import Count, Network
from optkit.models.networks.needs import for_windows


class LstmForecaster(Network):
    """An encoder and a decoder (Sutskever et al. 2014, arXiv 1409.3215) of one LSTM layer each."""

    hidden_size: Count = Field(default=128, description="units of each LSTM")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the forecaster."""
        channels, _, horizon = for_windows(needs, "lstm-forecaster")
        return LstmForecast(channels, horizon, self.hidden_size)


class LstmForecast(nn.Module):
    """Takes values (b, window, channels), and returns those that follow (b, horizon, channels)."""

    def __init__(self, channels: int, horizon: int, hidden_size: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.encoder = nn.LSTM(channels, hidden_size, batch_first=True)
        self.decoder = nn.LSTM(channels, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, channels)
        nn.init.zeros_(self.head.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Return the forecast; each day's is what the next one is made from."""
        last = values[:, -1:]
        _, state = self.encoder(values - last)
        day = torch.zeros_like(last)
        days = []
        for _ in range(self.horizon):
            output, state = self.decoder(day, state)
            day = self.head(output)
            days.append(day)
        return last + torch.cat(days, 1)
