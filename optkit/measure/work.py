"""Operations and bytes of each stage, counted from shapes: what a forward must at least compute and read.

A multiplication with an addition counts as two operations; norms, activations and the softmax are left out, as they are few.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optkit.measure.clock import EMBEDDING, HEAD, SCORES, stages_of

# Of T5 and BART: what a decoder makes of the encoder's states, once for a request.
_ACROSS = re.compile(r"(EncDecAttention|encoder_attn)\.(k|v|k_proj|v_proj)$")


@dataclass(frozen=True)
class Forward:
    """One forward: ``batch`` sequences of ``tokens`` new ones after ``past`` in the cache; logits of the last alone or of all.

    Of a model with an encoder and a decoder: with no ``past`` the encoder reads ``tokens`` and the decoder begins with one; else the
    decoder alone takes ``tokens``, and ``past`` is what it has written and what the encoder has read.
    """

    batch: int
    tokens: int
    past: int = 0
    only_last: bool = True


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes that are read or, of keys and values, written, and modules that are called for it."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls)


def work_of(module: nn.Module, forward: Forward) -> dict[str, Work]:
    """Return the work of each stage of a forward of a decoder, an encoder or another network."""
    found: dict[str, Work] = {}
    rows_of = _rows_of(module, forward)
    for name, stage in stages_of(module).items():
        layer, rows = module.get_submodule(name), rows_of(name)
        if not rows:
            continue
        if stage == EMBEDDING:
            work = Work(0.0, rows * _row_bytes(layer), 1)
        elif isinstance(layer, nn.Linear | Conv1D):
            outputs, inputs = _sizes(layer)
            count = forward.batch if stage == HEAD and forward.only_last else rows
            work = Work(2.0 * count * outputs * inputs, float(weight_bytes(layer)), 1)
        elif isinstance(layer, nn.RNNBase):
            work = Work(2.0 * rows * _recurrent_weights(layer), float(weight_bytes(layer)), 1)
        else:
            work = Work(0.0, float(sum(tensor.nbytes for tensor in layer.parameters(recurse=False))), 1)
        found[stage] = found.get(stage, Work()) + work
    scores = _scores(module, forward)
    if scores is not None:
        found[SCORES] = found.get(SCORES, Work()) + scores
    return found


def _rows_of(module: Any, forward: Forward) -> Callable[[str], int]:
    """Return what tells of a module how many rows go through it."""
    rows = forward.batch * forward.tokens
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return lambda name: rows
    encoder, begins = module.get_encoder(), forward.past == 0
    inner = {f"{name}." for name, layer in module.named_modules() if layer is encoder}

    def of(name: str) -> int:
        if name.startswith(tuple(inner)) or _ACROSS.search(name):
            return rows if begins else 0
        return forward.batch if begins else rows

    return of


def _scores(module: Any, forward: Forward) -> Work | None:
    """Return the work of scores and of the sums of values, for a decoder that sees what stands before; of an encoder, everything."""
    config = getattr(module, "config", None)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr]
    pairs = forward.tokens * forward.past + forward.tokens * (forward.tokens + 1) / 2
    flops = layers * forward.batch * heads * size * pairs * 4.0
    positions = forward.past + 2 * forward.tokens  # those before are read, the new ones written and read
    return Work(flops, layers * forward.batch * kv_heads * size * positions * 2.0 * _float_bytes(module))


def weight_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's weights as they are stored."""
    packed = getattr(layer, "weight_bytes", None)
    return int(packed) if isinstance(packed, int) else sum(tensor.nbytes for tensor in layer.parameters())


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _row_bytes(layer: nn.Module) -> float:
    weight = layer._parameters.get("weight")
    width = int(layer.embedding_dim)  # type: ignore[arg-type]
    return float(width * (weight.element_size() if isinstance(weight, Tensor) else 1))


def _recurrent_weights(layer: nn.RNNBase) -> int:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    directions = 1 + layer.bidirectional
    inputs = [layer.input_size] + [layer.hidden_size * directions] * (layer.num_layers - 1)
    return sum(directions * gates * layer.hidden_size * (width + layer.hidden_size) for width in inputs)


def _float_bytes(module: nn.Module) -> int:
    return next((tensor.element_size() for tensor in module.parameters() if tensor.is_floating_point()), 4)
