"""One step of a Llama-like decoder in a single call: what decoder.h needs to know of a model, and the memory it works in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optkit.core.errors import MissingError
from optkit.kernels.native import native
from optkit.kernels.packed import PackedLinear
from optkit.kernels.peers import PEER_LATE, SharedPeers

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class _Dense(ctypes.Structure):
    _fields_ = (("packed", _POINTER), ("weight", _POINTER), ("bias", _POINTER), ("rows", _COUNT), ("cols", _COUNT), ("half", _COUNT))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "attention_norm", "query_norm", "key_norm")),
        *((name, _Dense) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _POINTER) for name in ("keys", "values", "key_scale", "key_low", "value_scale", "value_low")),
        ("window", _COUNT),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        *((name, _POINTER) for name in ("final_norm", "cosine", "sine")),
        ("head", _Dense),
        *((name, _COUNT) for name in ("depth", "hidden", "heads", "kv_heads", "head_size", "widest", "capacity", "positions")),
        ("sinks", _COUNT),
        ("ring", _COUNT),
        ("peers", _POINTER),
        ("kv_bits", _COUNT),
        ("kv_groups", _COUNT),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("ticks", _POINTER),
    )


STAGES = ("norms", "attention projections", "attention scores", "feed-forward", "output head", "communication")  # as decoder.h counts them


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block: norms as weights (n,), products as linear layers. ``window`` 0 means that all positions are looked at."""

    input_norm: Tensor
    attention_norm: Tensor
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int = 0


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder; ``scale`` multiplies the scores of attention. ``peers`` hold the other shares of the same layers."""

    blocks: Sequence[BlockParts]
    final_norm: Tensor
    head: nn.Linear
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    scale: float
    peers: SharedPeers | None = None


class Decoder:
    """Keys and values of some sequences of equal length, and the step that adds one token to each."""

    def __init__(
        self,
        parts: DecoderParts,
        batch: int,
        rotation: tuple[Tensor, Tensor],
        kv_bits: int = 0,
        kv_groups: int = 1,
        sliding: tuple[int, int] | None = None,
    ) -> None:
        """Take what a model is made of, and make room for keys and values.

        Args:
            parts: of the model.
            batch: sequences.
            rotation: float32 cosine and sine (positions, head_size).
            kv_bits: 0 for keys and values in float32; 8 or 4 as ``kv.Packed`` tells.
            kv_groups: of channels in a head, for such numbers.
            sliding: how many last positions are kept, and how many first ones; None for all.

        Raises:
            MissingError: the compiled kernels are not here.
        """
        found = native()
        if found is None:
            raise MissingError("the compiled kernels are not here; optkit.kernels.native.explain() says why")
        self._native = found
        self._kept: list[object] = [parts]
        self.positions, self.batch = len(rotation[0]), batch
        self.capacity = self.positions if sliding is None else sum(sliding)
        places = (batch, parts.kv_heads, self.capacity)
        self.keys = [_empty_cache(places, parts.head_size, kv_bits, kv_groups) for _ in parts.blocks]
        self.values = [_empty_cache(places, parts.head_size, kv_bits, kv_groups) for _ in parts.blocks]
        blocks = [self._block(part, keys, values) for part, keys, values in zip(parts.blocks, self.keys, self.values, strict=True)]
        self._blocks = (_Block * len(blocks))(*blocks)
        self._peers = parts.peers
        self._vocabulary = parts.head.out_features
        hidden = parts.head.in_features
        self._struct = _Decoder(
            blocks=self._blocks,
            final_norm=self._floats(parts.final_norm),
            head=self._dense(parts.head),
            depth=len(blocks),
            hidden=hidden,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_size=parts.head_size,
            widest=max(part.gate.out_features for part in parts.blocks),
            capacity=self.capacity,
            ring=0 if sliding is None else sliding[0],
            sinks=0 if sliding is None else sliding[1],
            epsilon=parts.epsilon,
            scale=parts.scale,
            peers=None if parts.peers is None else parts.peers.address,
            kv_bits=kv_bits,
            kv_groups=kv_groups,
        )
        self.turn_by(rotation)
        self._threads = torch.get_num_threads()
        self._room = torch.empty(found.decoder_room(ctypes.addressof(self._struct), batch, self._threads))

    def watch(self, ticks: Tensor | None) -> None:
        """Add the ticks that each of ``STAGES`` takes to an int64 tensor (stages,) from now on; None: no longer."""
        self._struct.ticks = None if ticks is None else ticks.data_ptr()
        self._ticks = ticks  # keeps it alive

    def turn_by(self, rotation: tuple[Tensor, Tensor]) -> None:
        """Take cosine and sine (positions, head_size) of more positions than before."""
        self._rotation = [tensor.float().contiguous() for tensor in rotation]
        self._struct.cosine, self._struct.sine = (tensor.data_ptr() for tensor in self._rotation)
        self._struct.positions = self.positions = len(rotation[0])

    def step(self, hidden: Tensor, position: int) -> Tensor:
        """Take embeddings (b, hidden) of the tokens at a position, and return float32 logits (b, v).

        Raises:
            ValueError: there are not as many embeddings as sequences.
            IndexError: the position is beyond the capacity.
            ArmError: a process that holds another share of the layers does not come.
        """
        if hidden.shape != (self.batch, self._struct.hidden):
            raise ValueError(f"embeddings {tuple(hidden.shape)} do not fit {self.batch} sequences of {self._struct.hidden} channels")
        if position < 0:
            raise IndexError(f"position {position} is negative")
        hidden = hidden.float().contiguous()
        logits = torch.empty(len(hidden), self._vocabulary)
        address = ctypes.addressof(self._struct)
        status = self._native.decode(
            address, hidden.data_ptr(), len(hidden), position, logits.data_ptr(), self._room.data_ptr(), self._threads
        )
        if self._peers is not None and status == PEER_LATE:
            self._peers.refuse_late(status)
        if status:
            raise IndexError(f"position {position} is beyond the {self.positions} positions of the cache")
        return logits

    def _block(self, part: BlockParts, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> _Block:
        norms = {name: self._floats(getattr(part, name)) for name in ("input_norm", "attention_norm", "query_norm", "key_norm")}
        products = {name: self._dense(getattr(part, name)) for name in ("query", "key", "value", "output", "gate", "up", "down")}
        fields = ("keys", "key_scale", "key_low"), ("values", "value_scale", "value_low")
        kept = {
            name: tensor.data_ptr()
            for names, parts in zip(fields, (keys, values), strict=True)
            for name, tensor in zip(names, parts, strict=False)  # floats are alone, numbers have scales and lows
        }
        return _Block(**norms, **products, **kept, window=part.window)

    def _dense(self, layer: nn.Linear) -> _Dense:
        bias = self._floats(layer.bias)
        sizes = {"bias": bias, "rows": layer.out_features, "cols": layer.in_features}
        if isinstance(layer, PackedLinear):
            layer.owner.prepare()
            plan = layer.owner.plan
            assert plan is not None
            self._kept.append(plan)
            return _Dense(packed=plan.address, weight=None, half=0, **sizes)
        weight = layer.weight.detach().contiguous()
        weight = weight if weight.dtype is torch.bfloat16 else weight.float()
        self._kept.append(weight)
        return _Dense(packed=None, weight=weight.data_ptr(), half=int(weight.dtype is torch.bfloat16), **sizes)

    def _floats(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        wide = tensor.detach().float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()


def _empty_cache(places: tuple[int, int, int], head_size: int, bits: int, groups: int) -> tuple[Tensor, ...]:
    if not bits:
        return (torch.zeros(*places, head_size),)
    numbers = torch.zeros(*places, head_size * bits // 8, dtype=torch.uint8)
    return (numbers, *(torch.zeros(*places, groups, dtype=torch.bfloat16) for _ in range(2)))
