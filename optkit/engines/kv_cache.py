"""The model's own forward with a cache of keys and values in 8 or 4 bits. It saves memory, not time: attention gets floats.

Every position attends to what the cache gives back, its own key and value included. The floats of one layer exist while that
layer is at work; between the layers and between the tokens there are only the packed numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from optkit.core.errors import TransformError
from optkit.engines.eager import EagerEngine
from optkit.kernels import kv

_PIECES = 8


class KvCacheEngine(EagerEngine):
    """Generates like ``EagerEngine``, from quantized keys and values."""

    def __init__(self, module: nn.Module, bits: int = 8, group_size: int | None = None, keep_recent: int = 0) -> None:
        """Take a causal language model and the settings of ``kv_cache``.

        Raises:
            TransformError: a layer of it keeps something else than keys and values; see ``refusal``.
        """
        super().__init__(module)
        reason = refusal(module, bits, group_size)
        if reason is not None:
            raise TransformError(reason)
        self.bits, self.group_size, self.keep_recent = bits, group_size, keep_recent

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) ids as generating them one by one would give them.

        The last ``keep_recent`` positions of a forward are the same for all of its positions. So the text is given in pieces of an
        eighth of them: each position then sees at least 7/8 of ``keep_recent`` in full precision, never more than in generation.
        """
        whole = self.keep_recent == 0 or self.keep_recent >= input_ids.shape[1]
        pieces = input_ids.split(input_ids.shape[1] if whole else max(1, self.keep_recent // _PIECES), dim=1)
        cache = self._fresh()
        parts = [self.module(input_ids=piece.to(self.device), use_cache=True, **{self._cache_name: cache}).logits for piece in pieces]
        self._refuse_unused(cache)
        return torch.cat(parts, dim=1)

    def _run(self, ids: Tensor) -> Tensor:
        given = self.cache = self.cache or self._fresh()
        logits = super()._run(ids)
        self._refuse_unused(given)
        return logits

    def _fresh(self) -> Cache:
        layers = DynamicCache(config=self.module.config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        return Cache(layers=[KvLayer(self.bits, self.group_size, self.keep_recent, window) for window in windows])

    def _refuse_unused(self, cache: Any) -> None:
        unused = [number for number, layer in enumerate(cache.layers) if not layer.is_initialized]
        if unused:
            raise TransformError(f"{type(self.module).__name__} keeps the past of layer {unused[0]} elsewhere; leave kv_cache out")


class KvLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, for transformers' attention. ``keys`` and ``values`` hold the recent positions alone."""

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, bits: int, group_size: int | None, keep_recent: int, window: int | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.keep_recent = bits, group_size, keep_recent
        self.window = window
        self.is_sliding = window is not None
        self.packed_keys: kv.Packed | None = None
        self.packed_values: kv.Packed | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with nothing, in the types of these states."""
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take (b, h, n, d) keys and values of n new positions; return those of all positions that these may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        self.packed_keys, self.keys, seen_keys = self._add(self.packed_keys, self.keys, key_states)
        self.packed_values, self.values, seen_values = self._add(self.packed_values, self.values, value_states)
        return seen_keys, seen_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions ``query_length`` new ones will see, and the number of the first of them."""
        held = self.length if self.window is None else min(self.length, self.window - 1)
        return held + query_length, self.length - held

    def get_seq_length(self) -> int:
        """Return how many positions have come."""
        return self.length

    def get_max_length(self) -> int:
        """Return the window, or -1 where there is no end."""
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        """Forget all."""
        self.keys = self.values = None
        self.packed_keys = self.packed_values = None
        self.is_initialized = False
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse to follow beams.

        Raises:
            TransformError: always; optkit generates greedily.
        """
        raise TransformError("a quantized cache does not follow beams; generate greedily")

    def _add(self, packed: kv.Packed | None, recent: Tensor, new: Tensor) -> tuple[kv.Packed | None, Tensor, Tensor]:
        """Return what is packed, what is recent, and all that the new positions see; beyond the window nothing is kept."""
        recent = torch.cat((recent, new), dim=-2)
        leaving = max(0, recent.shape[-2] - self.keep_recent)
        if leaving:
            more = kv.quantize(recent[..., :leaving, :], self.bits, self.group_size)
            packed = more if packed is None else packed.followed_by(more)
            recent = recent[..., leaving:, :].clone()
        seen = recent if packed is None else torch.cat((kv.dequantize(packed, self.bits, new.dtype), recent), dim=-2)
        if self.window is not None:
            excess = max(0, seen.shape[-2] - self.window + 1)
            from_packed = min(excess, 0 if packed is None else packed.positions)
            if packed is not None and from_packed:
                packed = packed.without_first(from_packed)
            if excess > from_packed:
                recent = recent[..., excess - from_packed :, :].clone()
        return packed, recent, seen


def refusal(module: nn.Module, bits: int, group_size: int | None) -> str | None:
    """Return why this model's past cannot be quantized so, or None where it can. Shapes suffice."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return f"{type(module).__name__} has no configuration that tells its layers"
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__
            return f"layer {number} of {config.model_type} keeps its past as {kind}, not as keys and values; leave kv_cache out"
    return kv.refusal(_channels(config), bits, group_size)


def share_of_bytes(module: nn.Module, positions: int, bits: int, group_size: int | None = None, keep_recent: int = 0) -> float:
    """Return which share of the bytes of plain keys and values the packed ones of so many positions have. Shapes suffice."""
    channels = _channels(module.config)
    plain = channels * next(tensor.element_size() for tensor in module.parameters() if tensor.is_floating_point())
    packed = max(0, positions - keep_recent) / positions
    return 1 - packed * (1 - kv.bytes_of(channels, bits, group_size) / plain)


def _channels(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
