"""A Transformer encoder over the days of a series; all days to come are read from its last position, as changes to the last value seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import ModelError
from optkit.models.networks.contract import Count, Network
from optkit.models.networks.needs import for_windows


class TransformerForecaster(Network):
    """Blocks of attention and a feed-forward layer (Vaswani et al. 2017, arXiv 1706.03762), with norms before each."""

    hidden_size: Count = Field(default=64, description="width")
    layers: Count = Field(default=2, description="blocks")
    heads: Count = Field(default=4, description="attention heads")
    intermediate_size: Count = Field(default=256, description="width of the feed-forward layers")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the forecaster.

        Raises:
            ModelError: the heads do not divide the width.
        """
        if self.hidden_size % self.heads:
            raise ModelError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        channels, window, horizon = for_windows(needs, "transformer-forecaster")
        return TransformerForecast(channels, window, horizon, self)


class TransformerForecast(nn.Module):
    """Takes values (b, window, channels), and returns those that follow (b, horizon, channels)."""

    def __init__(self, channels: int, window: int, horizon: int, sizes: TransformerForecaster) -> None:
        super().__init__()
        self.horizon, self.channels = horizon, channels
        self.entry = nn.Linear(channels, sizes.hidden_size)
        self.places = nn.Embedding(window, sizes.hidden_size)
        self.blocks = nn.ModuleList(Block(sizes.hidden_size, sizes.heads, sizes.intermediate_size) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden_size)
        self.head = nn.Linear(sizes.hidden_size, horizon * channels)

    def forward(self, values: Tensor) -> Tensor:
        """Return the forecast."""
        last = values[:, -1:]
        states = self.entry(values - last) + self.places(torch.arange(values.shape[1], device=values.device))
        for block in self.blocks:
            states = block(states)
        changes: Tensor = self.head(self.norm(states[:, -1]))
        return last + changes.view(-1, self.horizon, self.channels)


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what it reads."""

    def __init__(self, width: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_feed_forward = nn.LayerNorm(width)
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)

    def forward(self, states: Tensor) -> Tensor:
        """Take and return (b, t, width)."""
        rows, days, width = states.shape
        parts = self.qkv(self.before_attention(states)).view(rows, days, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, days, width)
        states = states + self.out(seen)
        found: Tensor = states + self.down(functional.gelu(self.up(self.before_feed_forward(states))))
        return found
