"""Several models that answer together: the mean of their logits. It costs the time of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optkit.engines.eager import cache_name


class Answers(dict[str, Any]):
    """Logits (b, t, v), and the members' caches where they are used; by key, and the logits by attribute too."""

    @property
    def logits(self) -> Tensor:
        """The logits (b, t, v)."""
        found: Tensor = self["logits"]
        return found


class Members(nn.Module):
    """Causal language models of one vocabulary as one: it is called like any of them, and its cache is the list of theirs."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def config(self) -> Any:
        """The configuration of the first member."""
        return self.members[0].config

    def can_generate(self) -> bool:
        """Say that it does."""
        return True

    def forward(
        self, input_ids: Tensor, use_cache: bool = False, past_key_values: Any = None, logits_to_keep: int = 0, **rest: Any
    ) -> Answers:
        """Return the mean logits (b, t, v) of (b, t) ids, and the members' caches where they are used."""
        caches = past_key_values or [None] * len(self.members)
        logits, kept = [], []
        for member, cache in zip(self.members, caches, strict=True):
            name = cache_name(member)
            keep = {"logits_to_keep": logits_to_keep} if "logits_to_keep" in inspect.signature(member.forward).parameters else {}
            output = member(input_ids=input_ids, use_cache=use_cache, **{name: cache}, **keep, **rest)
            logits.append(output.logits[:, -logits_to_keep:] if logits_to_keep else output.logits)
            kept.append(output[name] if use_cache else None)
        return Answers(logits=torch.stack(logits).mean(0), past_key_values=kept if use_cache else None)
