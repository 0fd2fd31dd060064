"""The model's own forward with a cache whose room is taken beforehand: a new token is written into it, and nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from optkit.core.errors import TransformError
from optkit.engines.eager import EagerEngine
from optkit.engines.reusing import refusal

_ROUND_TO = 256


class StaticCacheEngine(EagerEngine):
    """Generates like ``EagerEngine``, whose cache is copied for each token. Attention sees what is written, not the whole room."""

    def __init__(self, module: nn.Module, positions: int | None = None) -> None:
        """Take a causal language model, and the positions to make room for; by default, the prompt's and as many again.

        Raises:
            TransformError: the model keeps something else of its past than keys and values of all positions.
        """
        super().__init__(module)
        reason = refusal(module)
        if reason is not None:
            raise TransformError(reason)
        self.positions = positions

    def _run(self, ids: Tensor) -> Tensor:
        if self.cache is None:
            depth = self.module.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
            room = self.positions or 2 * -(-ids.shape[1] // _ROUND_TO) * _ROUND_TO
            self.cache = Cache(layers=[RoomyLayer(room) for _ in range(depth)])
        return super()._run(ids)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (b, h, n, d) of one layer as the written part of a larger room, which doubles when it is full."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (b, h, n, d) keys and values of n new positions; return those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        end = before + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            self._grow(end, key_states, value_states)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., before:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def _grow(self, least: int, *states: Tensor) -> None:
        size = self.positions if not self._rooms else 2 * self._rooms[0].shape[-2]
        size = max(size, least)
        larger = [torch.zeros(*new.shape[:2], size, new.shape[-1], dtype=new.dtype, device=new.device) for new in states]
        for room, old in zip(larger, (self.keys, self.values), strict=True):
            if old.dim() == room.dim():
                room[..., : old.shape[-2], :] = old
        self._rooms = larger
