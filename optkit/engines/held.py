"""What a cache holds, counted from its tensors. Small ones that only count or mark are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

_DATA_DIMENSIONS = 3  # batch, positions, channels at the least


def held_bytes(held: Any) -> int:
    """Return the bytes behind all tensors reachable from a cache or a collection, spare room included, shared memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(held, set())}
    return sum(storages.values())


def _tensors(held: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(held) in seen or isinstance(held, str | bytes):
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        if held.dim() >= _DATA_DIMENSIONS:
            yield held
        return
    parts: Iterable[Any] = ()
    if isinstance(held, Mapping):
        parts = held.values()
    elif isinstance(held, list | tuple | set):
        parts = held
    elif type(held).__module__.startswith(("transformers.", "optkit.")):
        parts = vars(held).values()
    for part in parts:
        yield from _tensors(part, seen)
