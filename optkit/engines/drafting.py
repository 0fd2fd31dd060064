"""Several tokens a forward: a quick model guesses them one after another, and the model checks all guesses at once.

Source: Leviathan et al. 2022 (arXiv 2211.17192), for greedy choices: the tokens are those of the model alone, whatever the quick one says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optkit.engines.speculative import SpeculativeEngine


class DraftEngine(SpeculativeEngine):
    """Generates like ``EagerEngine``, for one sequence with the guesses of another engine.

    ``guessed`` and ``accepted`` count tokens, ``forwards`` the checks.
    """

    def __init__(self, module: nn.Module, draft: Any, tokens: int = 6) -> None:
        """Take a causal language model, the engine that guesses, which can ``rewind``, and how many tokens it guesses at once.

        Raises:
            TransformError: the model's cache cannot be cut back where a guess was wrong.
        """
        super().__init__(module, tokens)
        self.draft = draft
        self._base, self._tail = 0, list[int]()  # positions of the text that the other's cache holds, and guesses that it holds after them

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill both caches and return the (b, v) logits of the last position."""
        logits = super().prefill(input_ids)
        if self._text:
            self.draft.prefill(input_ids)
            self._base, self._tail = input_ids.shape[1], []
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values, those of the model that guesses included."""
        return super().cache_bytes() + int(self.draft.cache_bytes())

    def reset(self) -> None:
        """Forget both caches."""
        super().reset()
        self.draft.reset()

    @torch.inference_mode()
    def _guess(self, most: int) -> list[int]:
        """Return what the other model would write next."""
        if most < 1:
            return []
        known = self._base
        for mine, right in zip(self._tail, self._text[self._base :], strict=False):
            if mine != right:
                break
            known += 1
        known = min(known, len(self._text) - 1)  # the last token's logits are wanted
        self.draft.rewind(known)
        for token in self._text[known:]:
            logits = self.draft.step(torch.tensor([token]))
        found = [int(logits.argmax(-1))]
        while len(found) < most:
            found.append(int(self.draft.step(torch.tensor([found[-1]])).argmax(-1)))
        self._base, self._tail = len(self._text), found[:-1]
        return found
