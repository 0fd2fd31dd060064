"""Answers that are pieces of a text, found by their first and last token: examples, loss and choice for encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optkit.data.sides import Asked
from optkit.tasks.supervised import Examples

_IGNORED = -100  # of answers that do not stand in what is left of the text: PyTorch's cross entropy passes over it
_CONTEXT = 1  # the number of the second text in what a tokenizer gives for two


def span_examples(items: Sequence[Asked], tokenizer: Any, length: int) -> Examples:
    """Return questions with their texts as token ids (items, length), their mask, and first and last token of the answers (items, 2)."""
    found = _encoded(items, tokenizer, length)
    answers = torch.full((len(items), 2), _IGNORED)
    for row, item in enumerate(items):
        ends = item.start, item.start + len(item.answers[0])
        places = [place for place, (first, last) in _places(found, row) if item.start >= 0 and first < ends[1] and last > ends[0]]
        if places:
            answers[row] = torch.tensor([places[0], places[-1]])
    inputs = {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in found:
        inputs["token_type_ids"] = torch.tensor(found["token_type_ids"])
    return Examples(inputs, answers)


def span_loss(output: Any, answers: Tensor) -> Tensor:
    """Return the mean cross entropy of first and last token."""
    parts = zip((output.start_logits, output.end_logits), answers.T, strict=True)
    return torch.stack([functional.cross_entropy(logits.float(), wanted, ignore_index=_IGNORED) for logits, wanted in parts]).mean()


def spans(output: Any, items: Sequence[Asked], tokenizer: Any, length: int, most: int) -> tuple[list[str], Tensor]:
    """Return the most likely piece of each item's text, of so many tokens at most, and its ends (items, 2)."""
    found = _encoded(items, tokenizer, length)
    texts, ends = [], []
    for row, item in enumerate(items):
        places = dict(_places(found, row))
        allowed = torch.tensor([place in places for place in range(output.start_logits.shape[1])])
        starts, lasts = (logits[row].float().masked_fill(~allowed, -1e9) for logits in (output.start_logits, output.end_logits))
        both = (starts[:, None] + lasts[None, :]).triu().tril(most - 1)
        possible = torch.ones_like(both, dtype=torch.bool).triu().tril(most - 1)
        best = int(both.masked_fill(~possible, -1e18).argmax())
        first, last = divmod(best, both.shape[1])
        ends.append([first, last])
        texts.append(item.context[places[first][0] : places[last][1]] if first in places and last in places else "")
    return texts, torch.tensor(ends)


def _encoded(items: Sequence[Asked], tokenizer: Any, length: int) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pairs = [item.text for item in items], [f" {item.context}" for item in items]
    return tokenizer(*pairs, padding="max_length", truncation="only_second", max_length=length, return_offsets_mapping=True)


def _places(found: Any, row: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the tokens of the text with the characters that they stand for; a space was put before it."""
    sides, offsets = found.sequence_ids(row), found["offset_mapping"][row]
    inside = {place: (max(0, first - 1), last - 1) for place, (first, last) in enumerate(offsets) if sides[place] == _CONTEXT}
    return [(place, ends) for place, ends in inside.items() if ends[1] > ends[0]]
