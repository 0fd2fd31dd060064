"""Several tokens a forward: what is likely to follow is guessed from the text itself, and the model checks the guesses all at once.

Guesses are what followed the last words where they stood before (prompt lookup: Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding); the check is that of Leviathan et al. 2022 (arXiv 2211.17192) for greedy choices:
the tokens are those of the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.engines.reusing import ReusingEngine, refusal


class SpeculativeEngine(ReusingEngine):
    """Generates like ``EagerEngine``, for one sequence with guesses. ``guessed`` and ``accepted`` count tokens, ``forwards`` the checks."""

    def __init__(
        self, module: nn.Module, tokens: int = 6, longest_match: int = 3, chunk: int | None = None, entries: int = 0, least: int = 16
    ) -> None:
        """Take a causal language model, how many tokens are guessed at once, and how many last ones a guess stands on at most.

        Raises:
            TransformError: its cache cannot be cut back where a guess was wrong.
        """
        super().__init__(module, chunk, entries, least)
        reason = refusal(module)
        if reason is not None:
            raise TransformError(reason)
        self.tokens, self.longest_match = tokens, longest_match
        self.guessed = self.accepted = self.forwards = 0
        self._text: list[int] = []

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the cache and return the (b, v) logits of the last position."""
        self._text = input_ids[0].tolist() if len(input_ids) == 1 else []
        return super().prefill(input_ids)

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times; accepted guesses follow at once."""
        if len(token_ids) != 1 or not self._text:
            yield from super().further(token_ids, count)
            return
        self._text.append(int(token_ids))
        done = 0
        while done < count:
            guess = self._guess(min(self.tokens, count - done - 1))
            found = self._check(guess)
            for token in found:
                self._text.append(token)
                yield torch.tensor([token])
            done += len(found)

    @torch.inference_mode()
    def _check(self, guess: list[int]) -> list[int]:
        """Return the next tokens: the guesses that the model would have chosen, and the one that it chooses after these."""
        ids = torch.tensor([[self._text[-1], *guess]], device=self.device)
        output = self.module(input_ids=ids, use_cache=True, **{self._cache_name: self.cache})
        self.cache = output[self._cache_name]
        best = output.logits[0].argmax(-1).tolist()
        right = next((place for place, token in enumerate(guess) if best[place] != token), len(guess))
        if right < len(guess):
            self.cache.crop(right - len(guess))  # a negative number is what goes
        self.guessed += len(guess)
        self.accepted += right
        self.forwards += 1
        found: list[int] = [*guess[:right], best[right]]
        return found

    def _guess(self, most: int) -> list[int]:
        """Return what followed the last tokens where they stood last; the longest match counts."""
        text = self._text
        for length in range(min(self.longest_match, len(text) - 1), 0, -1):
            ending = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == ending:
                    return text[start + length : start + length + most]
        return []
