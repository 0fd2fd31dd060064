"""How likely a causal model finds the tokens that follow a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from optkit.core.subject import Subject
from optkit.tasks.windows import refuse_unknown_tokens

_TOGETHER = 16  # sequences a forward pass


class Likelihood(NamedTuple):
    """The sum of the log likelihoods of a continuation's tokens, in nats; their number; and whether each is the model's first choice."""

    nats: float
    tokens: int
    greedy: bool


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without special ones."""
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def beginning(tokenizer: Any) -> list[int]:
    """Return the token that a text begins with, where the tokenizer has one."""
    return [token for token in (tokenizer.bos_token_id,) if token is not None]


def likelihoods(subject: Subject, engine: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[Likelihood]:
    """Yield what the model makes of each continuation of a prompt, both given as token ids and neither empty."""
    for start in range(0, len(rows), _TOGETHER):
        part = rows[start : start + _TOGETHER]
        ids = torch.zeros(len(part), max(len(prompt) + len(rest) for prompt, rest in part), dtype=torch.long)
        for row, (prompt, rest) in enumerate(part):
            ids[row, : len(prompt) + len(rest)] = torch.tensor(prompt + rest)  # what follows is not seen by causal attention
        refuse_unknown_tokens(subject, ids)
        logits = engine.score(ids).cpu()
        for row, (prompt, rest) in enumerate(part):
            places = logits[row, len(prompt) - 1 : len(prompt) + len(rest) - 1].float()
            wanted = torch.tensor(rest)
            nats = float(places.log_softmax(-1).gather(1, wanted[:, None]).sum())
            yield Likelihood(nats, len(rest), bool((places.argmax(-1) == wanted).all()))
