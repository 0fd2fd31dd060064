"""Steps of one token in a single call of the kernels, for decoders of the Llama kind. Prompts go through the model's own forward.

Activations of the steps are float32, whatever the weights are; so are keys and values, unless the cache is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.device import place_of
from optkit.core.errors import TransformError
from optkit.engines.eager import EagerEngine
from optkit.engines.greedy import Greedy
from optkit.engines.held import held_bytes
from optkit.engines.kv_cache import KvCacheEngine
from optkit.engines.parallel.part import Part
from optkit.engines.reusing import ReusingEngine
from optkit.engines.sliding_window import SlidingWindowEngine
from optkit.kernels.decoder import BlockParts, Decoder, DecoderParts
from optkit.kernels.native import explain, native
from optkit.kernels.peers import SharedPeers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LANES, _WIDEST_HEAD, _MOST_SHARING = 16, 512, 64
_ROUND_TO = 256
_MOVING_ROTATIONS = ("dynamic", "longrope")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}  # a mistake gives about 1
_TOLERANCE_PACKED = {0: 0.0, 8: 0.05, 4: 0.3}  # numbers of a cache in so many bits may fall to the other side


class NativeEngine(Greedy):
    """Generates like ``EagerEngine``, and is compared with it once before it serves."""

    def __init__(
        self,
        module: nn.Module,
        cache: Mapping[str, Any] | None = None,
        part: Part | None = None,
        reuse: Mapping[str, Any] | None = None,
        sliding: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a causal language model, and the settings of ``kv_cache`` where its cache is quantized.

        ``part`` says of a shard what it is, and who has the others; ``reuse`` how prompts are taken, as ``ReusingEngine``
        asks for it; ``sliding`` which positions are kept, as ``SlidingWindowEngine`` does.

        Raises:
            TransformError: it is not one that the kernels know; see ``refusal``.
        """
        reason = refusal(module, cache, part)
        if reason is not None:
            raise TransformError(f"the native step cannot run this model: {reason}")
        self.module = module.eval()
        self.cache_bits = 0 if cache is None else int(cache["bits"])
        self._cache = cache
        self.sliding = None if sliding is None else (int(sliding["positions"]), int(sliding["sinks"]))
        self._eager = self._plain() if not reuse else ReusingEngine(module, **reuse)
        self._part = part if part is not None and part.peers is not None else None
        self._parts = _parts(module, self._part)
        self._groups = 1 if cache is None else self._parts.head_size // (cache["group_size"] or self._parts.head_size)
        self._embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        self._decoder: Decoder | None = None
        self._ticks: Tensor | None = None
        self._batch = self._position = 0
        self._compare()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        return self.prefill_by(self, input_ids)

    @torch.inference_mode()
    def prefill_by(self, other: NativeEngine, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, and the keys, values and logits of them that another engine computes, which ``is_like`` this one."""
        prompts = other._eager
        logits = prompts.prefill(input_ids)
        self._batch, self._position = input_ids.shape
        decoder = self._room_for(self._batch, self._position + 1)
        held = self._position if self.sliding is None else min(self._position, sum(self.sliding))
        for layer, keys, values in zip(prompts.cache.layers, decoder.keys, decoder.values, strict=True):
            if self.cache_bits:
                _fill(keys, layer.packed_keys, held)
                _fill(values, layer.packed_values, held)
            else:
                _fill(keys, (layer.keys,), held)
                _fill(values, (layer.values,), held)
        prompts.reset()
        return logits

    def is_like(self, other: Any) -> bool:
        """Say whether another engine keeps the same of a past: keys and values of as many layers and heads, in the same bits."""
        if not isinstance(other, NativeEngine) or self._part is not None or other._part is not None:
            return False
        if (self._cache, self.sliding) != (other._cache, other.sliding):
            return False
        mine, theirs = self._parts, other._parts
        return (len(mine.blocks), mine.kv_heads, mine.head_size) == (len(theirs.blocks), theirs.kv_heads, theirs.head_size)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        decoder = self._room_for(self._batch, self._position + 1)
        logits = decoder.step(self._embed(token_ids), self._position)
        if self._part is not None:
            logits = self._part.gather_rows(logits)
        self._position += 1
        return logits

    def watch(self, ticks: Tensor | None) -> None:
        """Add the ticks of each stage of later steps to an int64 tensor (stages,), as ``Decoder.watch`` does; None: no longer."""
        self._ticks = ticks
        if self._decoder is not None:
            self._decoder.watch(ticks)

    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by the model's own forward; a quantized cache takes part."""
        return self._eager.score(input_ids)

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values, the room for later positions included."""
        return held_bytes((self._decoder.keys, self._decoder.values)) if self._decoder is not None and self._batch else 0

    def rewind(self, positions: int) -> None:
        """Forget all positions of the cache but the first."""
        self._position = min(self._position, positions)

    def reset(self) -> None:
        """Forget the cache."""
        self._batch = self._position = 0

    def forget(self) -> None:
        """Forget the prompts of earlier requests, where they are kept."""
        if isinstance(self._eager, ReusingEngine):
            self._eager.forget()

    def _plain(self) -> EagerEngine:
        if self.sliding is not None:
            return SlidingWindowEngine(self.module, *self.sliding)
        return EagerEngine(self.module) if self._cache is None else KvCacheEngine(self.module, **self._cache)

    def _room_for(self, batch: int, positions: int) -> Decoder:
        """Return a decoder for so many positions; what the last one held of these sequences is kept."""
        old = self._decoder
        if old is not None and old.batch == batch and positions <= old.positions:
            return old
        whole = -(-max(positions, 2 * old.positions if old is not None and old.batch == batch else 0) // _ROUND_TO) * _ROUND_TO
        rotation = _rotation(self.module, whole)
        if old is not None and old.batch == batch and self.sliding is not None:
            old.turn_by(rotation)
            return old
        made = Decoder(self._parts, batch, rotation, self.cache_bits, self._groups, self.sliding)
        made.watch(self._ticks)
        if old is not None and old.batch == batch:
            for before, after in zip((*old.keys, *old.values), (*made.keys, *made.values), strict=True):
                _fill(after, before, old.capacity)
        self._decoder = made
        return made

    def _compare(self) -> None:
        """Refuse to serve where a few steps do not give what the model's own forward gives."""
        vocabulary = self._part.vocabulary if self._part is not None else self._parts.head.out_features
        ids = torch.arange(8, dtype=torch.long).mul(7919).remainder(vocabulary)[None]
        plain = self._plain()
        self.prefill(ids[:, :4])
        plain.prefill(ids[:, :4])
        worst = 0.0
        for token in ids[0, 4:]:
            mine, other = self.step(token[None]).double(), plain.step(token[None]).double()
            worst = max(worst, float((mine - other).norm() / other.norm().clamp_min(1e-30)))
        self.reset()
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        tolerance = _TOLERANCE.get(dtype, 1e-3)
        if not worst <= max(tolerance, _TOLERANCE_PACKED[self.cache_bits]):
            raise TransformError(f"the native step differs from the model's own by {worst:.1e} of the logits' norm; leave it out")


def refusal(module: nn.Module, cache: Mapping[str, Any] | None = None, part: Part | None = None) -> str | None:
    """Return why the native step cannot run this model with these settings of ``kv_cache``, or None where it can."""
    config = getattr(module, "config", None)
    family = getattr(config, "model_type", type(module).__name__)
    if config is None or family not in FAMILIES:
        return f"{family} is none of {', '.join(FAMILIES)}"
    place = place_of(module)
    if place.type not in ("cpu", "meta"):
        return f"the model is on {place}"
    if native() is None:
        return explain()
    if part is not None and part.peers is not None and not isinstance(part.peers, SharedPeers):
        return "its shards are on several hosts"
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    attention = module.model.layers[0].self_attn  # type: ignore[union-attr, index]
    wrong = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"rotation {rotation}": rotation in _MOVING_ROTATIONS,
        f"hidden size {config.hidden_size}, no multiple of {_LANES}": config.hidden_size % _LANES != 0,
        f"{attention.num_key_value_groups} heads that share keys": attention.num_key_value_groups > _MOST_SHARING,
        **(_cache_faults(cache, attention.head_dim) if cache is not None else {}),
        f"head size {attention.head_dim}": attention.head_dim % _LANES != 0 or attention.head_dim > _WIDEST_HEAD,
    }
    return next((reason for reason, found in wrong.items() if found), None)


def refuse_compiled_cache(module: nn.Module, backend: str, cache: Mapping[str, Any]) -> None:
    """Refuse a quantized cache together with compiled steps, where the native step is not asked for or cannot run it.

    Raises:
        TransformError: with the reason, and what to leave out.
    """
    reason = "graphs of torch.compile keep floats" if backend == "inductor" else refusal(module, cache)
    if reason is not None:
        raise TransformError(f"compiled steps cannot keep this quantized cache: {reason}; leave out compile or kv_cache")


def refuse_compiled_window(module: nn.Module, backend: str) -> None:
    """Refuse a sliding cache together with compiled steps, where the native step is not asked for or cannot run it.

    Raises:
        TransformError: with the reason, and what to leave out.
    """
    reason = "graphs of torch.compile keep all positions" if backend == "inductor" else refusal(module)
    if reason is not None:
        raise TransformError(f"compiled steps cannot keep a sliding cache: {reason}; leave out compile or sliding_window")


def _cache_faults(cache: Mapping[str, Any], head_size: int) -> dict[str, bool]:
    group, step = cache["group_size"] or head_size, _LANES * 8 // cache["bits"]
    return {
        f"keep_recent {cache['keep_recent']}, and the step packs every position": cache["keep_recent"] > 0,
        f"groups of {group} channels, no multiple of {step}": group % step != 0,
    }


def _fill(into: tuple[Tensor, ...], kept: tuple[Tensor, ...], end: int) -> None:
    """Copy (b, h, n, ...) tensors to the n positions before ``end``; a sliding window keeps the last positions alone."""
    for large, small in zip(into, kept, strict=True):
        large[:, :, end - small.shape[2] : end] = small


def _parts(module: Any, part: Part | None) -> DecoderParts:
    from transformers import DynamicCache

    config, layers = module.config, module.model.layers
    windows = [getattr(layer, "sliding_window", 0) for layer in DynamicCache(config=config).layers]
    attention = layers[0].self_attn
    return DecoderParts(
        blocks=[_block(layer, window) for layer, window in zip(layers, windows, strict=True)],
        final_norm=module.model.norm.weight,
        head=module.get_output_embeddings(),
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_size=attention.head_dim,
        epsilon=config.rms_norm_eps,
        scale=attention.scaling,
        peers=part.peers if part is not None and isinstance(part.peers, SharedPeers) else None,
    )


def _block(layer: Any, window: int) -> BlockParts:
    attention, mlp = layer.self_attn, layer.mlp
    return BlockParts(
        input_norm=layer.input_layernorm.weight,
        attention_norm=layer.post_attention_layernorm.weight,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        window=window,
    )


@torch.inference_mode()
def _rotation(module: Any, positions: int) -> tuple[Tensor, Tensor]:
    cosine, sine = module.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
    return cosine[0].contiguous(), sine[0].contiguous()
