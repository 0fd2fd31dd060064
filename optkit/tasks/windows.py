"""Texts as token ids, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.subject import Subject


def stream_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the token ids of all texts in a row, each begun by the tokenizer's first special token where it has one."""
    begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ([] if begin is None else [begin]) + ids], dtype=torch.long)


def refuse_unknown_tokens(subject: Subject, ids: Tensor) -> None:
    """Refuse a model that knows fewer tokens than its tokenizer gives.

    Raises:
        DataError: with both numbers.
    """
    known: int = subject.module.config.vocab_size  # type: ignore[union-attr,assignment]
    if ids.numel() and int(ids.max()) >= known:
        raise DataError(
            f"the tokenizer of model {subject.source!r} gives token {int(ids.max())}, and the model knows {known}: "
            "they do not belong together"
        )


def cut(stream: Tensor, window: int, stride: int | None) -> Tensor:
    """Return (w, window) windows; the last, incomplete one is left out unless it is the only one.

    Raises:
        DataError: there are not two tokens.
    """
    if stream.numel() < 2:
        raise DataError("the corpus is too short: not two tokens")
    window = min(window, stream.numel())
    return stream.unfold(0, window, stride or window)


def spread(windows: Tensor, count: int) -> Tensor:
    """Return at most ``count`` rows, evenly spread."""
    if len(windows) <= count:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def prompts_of(subject: Subject, stream: Callable[[], Tensor], count: int, length: int) -> Tensor:
    """Return (count, length) ids from all over a stream; for a subject without a tokenizer, random ids from a fixed seed."""
    if subject.tokenizer is None:
        vocabulary: int = subject.module.config.vocab_size  # type: ignore[union-attr,assignment]
        return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    windows = cut(stream(), length, None)
    return spread(windows.repeat(-(-count // len(windows)), 1), count)


def windows_of(texts: Sequence[str], tokenizer: Any, length: int, stride: int) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (items, windows, length) of whole texts; windows that a text does not need are masked.

    Args:
        texts: the items.
        tokenizer: of transformers, a fast one.
        length: tokens of a window, those that the tokenizer puts around a text included.
        stride: tokens of a text from one window's beginning to the next one's.
    """
    overlap = max(0, length - tokenizer.num_special_tokens_to_add() - stride)
    found = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_tensors="pt",
    )
    owners = found["overflow_to_sample_mapping"]
    counts = torch.bincount(owners, minlength=len(texts))
    places = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    windows = {}
    for name, filling in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0)):
        windows[name] = torch.full((len(texts), int(counts.max()), length), filling)
        windows[name][owners, places] = found[name]
    return windows
