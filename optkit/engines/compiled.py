"""Steps of one token as one graph of torch.compile, on a cache of fixed size. Prompts run eagerly, because their lengths differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.device import place_of
from optkit.engines.eager import at, at_host, cache_name, floats_of, in_dtype
from optkit.engines.greedy import Greedy
from optkit.engines.held import held_bytes
from optkit.kernels.packed import prepare_layers

_ROUND_TO = 256


class CompiledEngine(Greedy):
    """Generates with transformers' static cache; a new batch size, or a text beyond the cache's size, compiles anew."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self._caches: dict[tuple[int, int], Any] = {}
        self._key = (0, 0)  # sequences, and positions of their cache
        self._length = 0
        self._cache_name = cache_name(module)
        self._device = place_of(module)
        # On CUDA a step is a replay of one recorded graph of launches, which would else cost more than the work.
        self._recorded = self._device.type == "cuda"
        self._graph = torch.compile(self._forward, fullgraph=True, dynamic=False, mode="reduce-overhead" if self._recorded else None)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        prepare_layers(self.module)
        batch, self._length = input_ids.shape
        self._key = (batch, _rounded(self._length + _ROUND_TO // 2))
        cache = self._cache()
        cache.reset()
        output = self.module(input_ids=input_ids.to(self._device), use_cache=True, **{self._cache_name: cache})
        logits: Tensor = output.logits[:, -1]
        return logits

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        if self._length == self._key[1]:
            self._grow()
        ids = token_ids[:, None].to(self._device).clone(memory_format=torch.contiguous_format)  # another stride would be another graph
        positions = torch.tensor([[self._length]], device=self._device)
        if self._recorded:
            torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = self._graph(ids, positions, self._cache())
        self._length += 1
        return logits.clone() if self._recorded else logits  # the next replay writes to the same place

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by one forward of the model's own without a cache."""
        logits: Tensor = self.module(input_ids=input_ids.to(self._device), use_cache=False).logits
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values, the room for later positions included."""
        return held_bytes(self._cache()) if self._length else 0

    def reset(self) -> None:
        """Forget the cache."""
        self._length = 0

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        output = self.module(input_ids=ids, position_ids=positions, use_cache=True, **{self._cache_name: cache})
        logits: Tensor = output.logits[:, -1]
        return logits

    def _cache(self) -> Any:
        from transformers import StaticCache

        if self._key not in self._caches:
            self._caches[self._key] = StaticCache(config=self.module.config, max_cache_len=self._key[1])
        return self._caches[self._key]

    def _grow(self) -> None:
        """Go on in a cache of twice the size."""
        before = self._cache()
        self._key = (self._key[0], 2 * self._key[1])
        for old, new in zip(before.layers, self._cache().layers, strict=True):
            if not new.is_initialized:
                new.lazy_initialization(old.keys, old.values)
            new.reset()
            new.keys[:, :, : old.keys.shape[2]] = old.keys
            new.values[:, :, : old.values.shape[2]] = old.values
            new.cumulative_length.copy_(old.cumulative_length)


def _rounded(positions: int) -> int:
    return -(-positions // _ROUND_TO) * _ROUND_TO


class CompiledForward:
    """Calls the compiled module with one batch; a new shape may compile anew."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        prepare_layers(self.module)
        self._device = place_of(module)
        self._dtype = floats_of(module)
        self._graph = torch.compile(self.module)

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the module's output for one batch of keyword inputs, in the memory of the host."""
        return at_host(self._graph(**in_dtype(self._dtype, at(self._device, batch))))
