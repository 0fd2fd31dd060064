"""The model's own forward with a cache that keeps the first and the last positions alone: its size no longer grows with the text.

The first ones, the sinks, are kept because attention leans on them whatever they say (Xiao et al. 2023, arXiv 2309.17453). Positions
keep their numbers: unlike there, rotations are not counted anew within the cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from optkit.core.errors import TransformError
from optkit.engines import reusing
from optkit.engines.eager import EagerEngine

_PIECE = 512  # at least so many positions go through a forward together: short pieces read all weights for few rows


class SlidingWindowEngine(EagerEngine):
    """Generates like ``EagerEngine``; a position sees the first ``sinks`` positions and the last ``positions``, itself included."""

    def __init__(self, module: nn.Module, positions: int, sinks: int = 4) -> None:
        """Take a causal language model.

        Raises:
            TransformError: its past cannot be cut so; see ``refusal``.
        """
        super().__init__(module)
        reason = refusal(module)
        if reason is not None:
            raise TransformError(reason)
        self.positions, self.sinks = positions, sinks

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        self.reset()
        for piece in self._pieces(input_ids):
            logits = self._run(piece)
        return logits

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) ids, each position judged from what the cache would hold of the others."""
        cache = self._fresh()
        parts = [self._forward(piece, cache).logits for piece in self._pieces(input_ids)]
        return torch.cat(parts, dim=1)

    def _pieces(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return a text in pieces, so that what a forward holds at once does not grow with the text either."""
        pieces: tuple[Tensor, ...] = input_ids.split(piece_tokens(self.positions, self.sinks), dim=1)
        return pieces

    def _run(self, ids: Tensor) -> Tensor:
        self.cache = self.cache or self._fresh()
        logits: Tensor = self._forward(ids, self.cache, **self._keep).logits[:, -1]
        return logits

    def _forward(self, ids: Tensor, cache: Cache, **further: Any) -> Any:
        before, new = cache.get_seq_length(), ids.shape[1]
        mask = self._mask(before, new) if new > 1 else None  # one position sees all that is kept
        positions = torch.arange(before, before + new, device=self.device)[None]
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": True, self._cache_name: cache}
        return self.module(input_ids=ids.to(self.device), **given, **further)

    def _mask(self, before: int, new: int) -> Tensor:
        """Return (1, 1, new, kept + new): 0 where a new position sees a kept or new one, else the least number there is."""
        kept = torch.tensor(_kept(before, self.positions, self.sinks), dtype=torch.long)
        mine = torch.arange(before, before + new)
        theirs, mine = torch.cat((kept, mine))[None, :], mine[:, None]
        seen = (theirs <= mine) & ((theirs < self.sinks) | (theirs > mine - self.positions))
        dtype = self.module.get_input_embeddings().weight.dtype  # type: ignore[operator]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(self.device)

    def _fresh(self) -> Cache:
        depth = self.module.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
        return Cache(layers=[SlidingLayer(self.positions, self.sinks) for _ in range(depth)])


def piece_tokens(positions: int, sinks: int) -> int:
    """Return how many positions of a prompt go through a forward together."""
    return max(_PIECE, sinks + positions)


def refusal(module: nn.Module) -> str | None:
    """Return why this model's past cannot be cut so, or None where it can. Shapes suffice."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return f"{type(module).__name__} counts its positions by the mask, and here some are missing"
    return reusing.refusal(module)


class SlidingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (b, h, kept, d) of one layer: the sinks, then a ring in which the newest position takes the place of the oldest."""

    is_croppable = False
    is_sliding = False  # transformers' word for layers whose mask is another one; here the engine makes the mask
    keys: Any
    values: Any

    def __init__(self, positions: int, sinks: int) -> None:
        super().__init__()
        self.positions, self.sinks, self.length = positions, sinks, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for all that is ever kept, in the types of these states."""
        self._rooms = [_room(states, self.sinks + self.positions) for states in (key_states, value_states)]
        self._show()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take (b, h, n, d) keys and values of n new positions; return what these may see: all that was kept, and themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        before, self.length = self.length, self.length + new
        seen = (torch.cat((self.keys, key_states), -2), torch.cat((self.values, value_states), -2)) if new > 1 else None
        staying = [at for at in range(before, self.length) if at < self.sinks or at >= self.length - self.positions]
        places = torch.tensor([_place(at, self.positions, self.sinks) for at in staying], device=key_states.device)
        chosen = torch.tensor(staying, device=key_states.device) - before
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room.index_copy_(-2, places, states.index_select(-2, chosen))
        self._show()
        return seen or (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions ``query_length`` new ones will see, and a number that lets one see all of them."""
        seen = min(self.length, self.sinks + self.positions) + query_length
        if query_length == 1:
            seen = min(seen, self.sinks + self.positions)
        return seen, self.length + query_length - seen

    def get_seq_length(self) -> int:
        """Return how many positions have come."""
        return self.length

    def get_max_length(self) -> int:
        """Return that there is no end."""
        return -1

    def reset(self) -> None:
        """Forget all."""
        self.is_initialized, self.length = False, 0
        self.keys = self.values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse to follow beams.

        Raises:
            TransformError: always; optkit generates greedily.
        """
        raise TransformError("a sliding cache does not follow beams; generate greedily")

    def _show(self) -> None:
        held = min(self.length, self.sinks + self.positions)
        self.keys, self.values = (room[..., :held, :] for room in self._rooms)


def _place(at: int, positions: int, sinks: int) -> int:
    return at if at < sinks else sinks + (at - sinks) % positions


def _kept(length: int, positions: int, sinks: int) -> list[int]:
    """Return the numbers of the kept positions, in the order of their places."""
    known = range(length) if length <= sinks + positions else [*range(sinks), *range(length - positions, length)]
    return sorted(known, key=lambda at: _place(at, positions, sinks))


def _room(states: Tensor, places: int) -> Tensor:
    batch, heads, _, channels = states.shape
    return states.new_zeros(batch, heads, places, channels)
