"""Steps of one token in a single call of the kernels, for decoders of the Llama kind. Prompts go through the model's own forward.

Activations, keys and values of the steps are float32, whatever the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.engines.eager import EagerEngine
from optkit.kernels.decoder import BlockParts, Decoder, DecoderParts
from optkit.kernels.native import explain, native

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LANES, _WIDEST_HEAD, _MOST_SHARING = 16, 512, 64
_ROUND_TO = 256
_MOVING_ROTATIONS = ("dynamic", "longrope")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}  # a mistake gives about 1


class NativeEngine:
    """Generates like ``EagerEngine``, and is compared with it once before it serves."""

    def __init__(self, module: nn.Module) -> None:
        """Take a causal language model.

        Raises:
            TransformError: it is not one that the kernels know; see ``refusal``.
        """
        reason = refusal(module)
        if reason is not None:
            raise TransformError(f"the native step cannot run this model: {reason}")
        self.module = module.eval()
        self._eager = EagerEngine(module)
        self._parts = _parts(module)
        self._embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        self._decoder: Decoder | None = None
        self._batch = self._position = 0
        self._compare()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        logits = self._eager.prefill(input_ids)
        self._batch, self._position = input_ids.shape
        decoder = self._room_for(self._batch, self._position + 1)
        for layer, keys, values in zip(self._eager.cache.layers, decoder.keys, decoder.values, strict=True):
            kept = layer.keys.shape[2]  # a sliding window keeps the last positions alone
            keys[:, :, self._position - kept : self._position] = layer.keys
            values[:, :, self._position - kept : self._position] = layer.values
        self._eager.reset()
        return logits

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits."""
        decoder = self._room_for(self._batch, self._position + 1)
        logits = decoder.step(self._embed(token_ids), self._position)
        self._position += 1
        return logits

    def reset(self) -> None:
        """Forget the cache."""
        self._batch = self._position = 0

    def _room_for(self, batch: int, positions: int) -> Decoder:
        """Return a decoder for so many positions; what the last one held of these sequences is kept."""
        old = self._decoder
        if old is not None and old.batch == batch and positions <= old.capacity:
            return old
        capacity = -(-max(positions, 2 * old.capacity if old is not None and old.batch == batch else 0) // _ROUND_TO) * _ROUND_TO
        cosine, sine = _rotation(self.module, capacity)
        made = Decoder(self._parts, batch, cosine, sine)
        if old is not None and old.batch == batch:
            for before, after in ((old.keys, made.keys), (old.values, made.values)):
                for small, large in zip(before, after, strict=True):
                    large[:, :, : old.capacity] = small
        self._decoder = made
        return made

    def _compare(self) -> None:
        """Refuse to serve where a few steps do not give what the model's own forward gives."""
        vocabulary = self._parts.head.out_features
        ids = torch.arange(8, dtype=torch.long).mul(7919).remainder(vocabulary)[None]
        plain = EagerEngine(self.module)
        self.prefill(ids[:, :4])
        plain.prefill(ids[:, :4])
        worst = 0.0
        for token in ids[0, 4:]:
            mine, other = self.step(token[None]).double(), plain.step(token[None]).double()
            worst = max(worst, float((mine - other).norm() / other.norm().clamp_min(1e-30)))
        self.reset()
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        if not worst <= _TOLERANCE.get(dtype, 1e-3):
            raise TransformError(f"the native step differs from the model's own by {worst:.1e} of the logits' norm; leave it out")


def refusal(module: nn.Module) -> str | None:
    """Return why the native step cannot run this model, or None where it can."""
    config = getattr(module, "config", None)
    family = getattr(config, "model_type", type(module).__name__)
    if config is None or family not in FAMILIES:
        return f"{family} is none of {', '.join(FAMILIES)}"
    if native() is None:
        return explain()
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    attention = module.model.layers[0].self_attn  # type: ignore[union-attr, index]
    wrong = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"rotation {rotation}": rotation in _MOVING_ROTATIONS,
        f"hidden size {config.hidden_size}, no multiple of {_LANES}": config.hidden_size % _LANES != 0,
        f"{attention.num_key_value_groups} heads that share keys": attention.num_key_value_groups > _MOST_SHARING,
        f"head size {attention.head_dim}": attention.head_dim % _LANES != 0 or attention.head_dim > _WIDEST_HEAD,
    }
    return next((reason for reason, found in wrong.items() if found), None)


def _parts(module: Any) -> DecoderParts:
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
