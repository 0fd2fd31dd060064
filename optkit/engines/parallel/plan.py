"""How the layers of a model are shared: by its own plan where transformers has one, by ours for gpt2, opt and bloom."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from optkit.core.errors import TransformError

How = Literal["colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"]
"""Of a weight (out, in): each shard has some outputs, or some inputs and everyone's products are summed. Where what is between is not
shared, outputs are put together again, and inputs are taken apart."""

_OWN: Mapping[str, Mapping[str, How]] = {
    "gpt2": {
        "h.*.attn.c_attn": "colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "opt": {
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    },
    "bloom": {
        "h.*.self_attention.query_key_value": "colwise",
        "h.*.self_attention.dense": "rowwise",
        "h.*.mlp.dense_h_to_4h": "colwise",
        "h.*.mlp.dense_4h_to_h": "rowwise",
    },
}
_THREE_IN_ONE = {"c_attn": 3}  # all queries, then all keys, then all values: each is shared by itself
_COUNTS = {"gpt2": ("num_heads", "split_size", "embed_dim"), "opt": ("num_heads",), "bloom": ("num_heads",)}
_KEPT_WHOLE = {"replicated_with_grad_allreduce", "embedding_rowwise"}


@dataclass(frozen=True)
class Shared:
    """A layer that is shared. ``segments`` are shared one by one."""

    how: How
    segments: int = 1


def shared_layers(module: nn.Module) -> dict[str, Shared]:
    """Return how each layer of the blocks is shared, by name.

    Raises:
        TransformError: nobody has a plan for such a model, or it names ways that are not known here.
    """
    config = _config(module)
    kind, prefix = config.model_type, getattr(module, "base_model_prefix", "")
    plan: Mapping[str, Any] | None = _OWN.get(kind) or getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise TransformError(f"no plan says how the layers of a {kind} are shared by several processes; use pipeline_parallel")
    plan = {name: how for name, how in plan.items() if how not in _KEPT_WHOLE}
    unknown = sorted(set(plan.values()) - set(How.__args__))  # type: ignore[attr-defined]
    if unknown:
        raise TransformError(f"the plan of {kind} shares layers in ways not known here: {', '.join(unknown)}; use pipeline_parallel")
    patterns = {re.compile(rf"{prefix}\." + re.escape(name).replace(r"\*", r"\d+")): how for name, how in plan.items()}
    found = {}
    for name, _ in module.named_modules():
        how = next((how for pattern, how in patterns.items() if pattern.fullmatch(name)), None)
        if how is not None:
            found[name] = Shared(how, _THREE_IN_ONE.get(name.rpartition(".")[2], 1))
    return found


def head_counts(module: nn.Module) -> tuple[int, int]:
    """Return the heads of queries, and those of keys and values."""
    config = _config(module)
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def shares_heads(shared: Mapping[str, Shared]) -> bool:
    """Say whether each process computes the attention of some heads alone, and not all of it."""
    return all(one.how in ("colwise", "rowwise") for one in shared.values())


def tell_fewer_heads(module: nn.Module, shared: Mapping[str, Shared], size: int) -> None:
    """Tell attention layers that count their heads how many they have left."""
    for key in _COUNTS.get(_config(module).model_type, ()):
        for holder in {name.rpartition(".")[0] for name in shared}:
            layer = module.get_submodule(holder)
            if hasattr(layer, "num_heads") and type(getattr(layer, key, None)) is int:
                setattr(layer, key, getattr(layer, key) // size)


def biased_by_head(module: nn.Module) -> list[nn.Module]:
    """Return the attention layers that are given a bias by position for every head of the whole model (bloom's alibi)."""
    if _config(module).model_type != "bloom":
        return []
    return [layer for name, layer in module.named_modules() if name.endswith(".self_attention")]


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        raise TransformError(f"{type(module).__name__} is no causal language model of transformers, whose layers could be shared")
    return config
