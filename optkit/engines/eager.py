"""Runs the model's own forward, operator by operator. Nothing is compiled: what Python costs each token is part of the time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optkit.core.device import place_of
from optkit.engines.greedy import Greedy
from optkit.engines.held import held_bytes


def cache_name(module: nn.Module) -> str:
    """Return what this version of transformers calls the cache of keys and values, as an argument and in the output."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def at(device: torch.device, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def floats_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the module's first floating parameter; None where it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def in_dtype(dtype: torch.dtype | None, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch with its floats in a dtype; None: as they are."""
    return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def at_host(output: Any) -> Any:
    """Return an output with its tensors in the memory of the host; from CUDA, that is also the wait for them."""
    return tree_map(lambda part: part.cpu() if isinstance(part, Tensor) and part.is_cuda else part, output)


class EagerEngine(Greedy):
    """Generates with the key-value cache that transformers makes for the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self.device = place_of(module)
        self.cache: Any = None
        self._cache_name = cache_name(module)
        # Only the last position's logits are wanted; a model that cannot leave the others out computes them all.
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        self.reset()
        return self._run(input_ids)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        return self._run(token_ids[:, None])

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by one forward without a cache."""
        logits: Tensor = self.module(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values."""
        return held_bytes(self.cache)

    def rewind(self, positions: int) -> None:
        """Forget all positions of the cache but the first."""
        behind = positions - self.cache.get_seq_length()
        if behind < 0:
            self.cache.crop(behind)  # a negative number is what goes

    def reset(self) -> None:
        """Forget the cache."""
        self.cache = None

    def _run(self, ids: Tensor) -> Tensor:
        output = self.module(input_ids=ids.to(self.device), use_cache=True, **{self._cache_name: self.cache}, **self._keep)
        self.cache = output[self._cache_name]
        logits: Tensor = output.logits[:, -1]
        return logits


class EagerForward:
    """Calls the module with one batch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self.device = place_of(module)
        self._dtype = floats_of(module)

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the module's output for one batch of keyword inputs, in the memory of the host; floats are given in the module's dtype."""
        return at_host(self.module(**in_dtype(self._dtype, at(self.device, batch))))
