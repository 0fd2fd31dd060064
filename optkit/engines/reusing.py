"""The model's own forward with prompts in pieces, and with beginnings that were met before taken from memory.

Pieces bound what a long prompt's forward holds at once; a beginning that several prompts share is computed once (as in vLLM's automatic
prefix caching, https://docs.vllm.ai, and in Zheng et al. 2023, arXiv 2312.07104). Neither changes what is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.engines.eager import EagerEngine

_Layers = list[tuple[Tensor, Tensor]]


class ReusingEngine(EagerEngine):
    """Generates like ``EagerEngine``. ``computed`` counts the prompt positions that were really computed, ``reused`` the others."""

    def __init__(self, module: nn.Module, chunk: int | None = None, entries: int = 0, least: int = 16) -> None:
        """Take a causal language model.

        Args:
            module: the model.
            chunk: positions of a prompt that are computed at once; None for all.
            entries: prompts whose keys and values are kept for later ones; 0 for none.
            least: positions that a shared beginning must have to be worth it.

        Raises:
            TransformError: the model keeps something else of its past than keys and values of all positions.
        """
        super().__init__(module)
        reason = refusal(module) if entries else None
        if reason is not None:
            raise TransformError(reason)
        self.chunk, self.entries, self.least = chunk, entries, least
        self.computed = self.reused = 0
        self._known: OrderedDict[tuple[int, ...], _Layers] = OrderedDict()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        self.reset()
        start = self._begin(input_ids) if self.entries else 0
        pieces = input_ids[:, start:].split(self.chunk or input_ids.shape[1], dim=1)
        for piece in pieces:
            logits = self._run(piece)
        self.computed += len(input_ids) * (input_ids.shape[1] - start)
        self.reused += len(input_ids) * start
        if self.entries:
            self._keep_prompt(input_ids)
        return logits

    def forget(self) -> None:
        """Forget the prompts of earlier requests."""
        self._known.clear()

    def _begin(self, input_ids: Tensor) -> int:
        """Put the longest beginning that is known, or that all rows share, into the cache; return its length."""
        rows = [tuple(row) for row in input_ids.tolist()]
        most = input_ids.shape[1] - 1  # the last position's logits are wanted
        known = max(((_shared([*rows, ids]), ids) for ids in self._known), default=(0, ()))
        common = min(_shared(rows), most) if len(rows) > 1 else 0
        if min(known[0], most) >= max(self.least, common):
            self._known.move_to_end(known[1])
            self.cache = self._cache_of(self._known[known[1]], min(known[0], most), len(rows))
            return min(known[0], most)
        if common < self.least:
            return 0
        for piece in input_ids[:1, :common].split(self.chunk or common, dim=1):
            self._run(piece)
        self.computed += common
        self.reused -= common  # of the first row
        self.cache = self._cache_of([(layer.keys, layer.values) for layer in self.cache.layers], common, len(rows))
        return common

    def _cache_of(self, layers: _Layers, length: int, rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.module.config)
        for number, (keys, values) in enumerate(layers):
            cache.update(*(tensor[:1, :, :length].expand(rows, -1, -1, -1) for tensor in (keys, values)), number)
        return cache

    def _keep_prompt(self, input_ids: Tensor) -> None:
        length = input_ids.shape[1]
        kept = [(layer.keys[:1, :, :length].clone(), layer.values[:1, :, :length].clone()) for layer in self.cache.layers]
        self._known[tuple(input_ids[0].tolist())] = kept
        while len(self._known) > self.entries:
            self._known.popitem(last=False)


def refusal(module: nn.Module) -> str | None:
    """Return why beginnings of this model's past cannot be taken out of their place, or None where they can. Shapes suffice."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config: Any = getattr(module, "config", None)
    if config is None:
        return f"{type(module).__name__} has no configuration that tells its layers"
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is not DynamicLayer:
            return f"layer {number} of {config.model_type} keeps {type(layer).__name__}, from which no beginning can be taken"
    return None


def _shared(rows: list[tuple[int, ...]]) -> int:
    """Return how many first ids are the same in all rows."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
