"""Runs models with an encoder and a decoder by their own forward: the encoder once a request, the decoder once a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.device import place_of
from optkit.core.errors import TransformError
from optkit.engines.eager import at, at_host, cache_name
from optkit.engines.greedy import Greedy
from optkit.engines.held import held_bytes


class Seq2SeqEngine(Greedy):
    """Generates with the caches that transformers makes: of the decoder's own keys and values, and of those it reads of the encoder.

    A request is what the encoder takes: ``input_ids`` (b, p), and where rows differ in length their ``attention_mask``.
    """

    def __init__(self, module: Any) -> None:
        self.module: nn.Module = module.eval()
        self.device = place_of(module)
        self.cache: Any = None
        self._encoder = module.get_encoder()
        start = module.generation_config.decoder_start_token_id
        if start is None:
            raise TransformError(
                f"the configuration of {type(module).__name__} does not say which token begins an answer: decoder_start_token_id"
            )
        self._start = int(start)
        self._cache_name = cache_name(module)
        self._request: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill(self, request: Mapping[str, Tensor]) -> Tensor:
        """Read the request, begin the answer, and return the (b, v) logits of its first token."""
        self.reset()
        given = at(self.device, request)
        mask = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        self._request = {"encoder_outputs": self._encoder(input_ids=given["input_ids"], **mask), **mask}
        return self._run(torch.full((len(given["input_ids"]), 1), self._start, device=self.device))

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each answer, and return their (b, v) logits."""
        return self._run(token_ids[:, None])

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's output for requests with their answers as ``labels``, each token judged after the right ones before it."""
        return at_host(self.module(**at(self.device, batch), use_cache=False))

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values, those of the encoder's states included."""
        return held_bytes(self.cache)

    def reset(self) -> None:
        """Forget the request."""
        self.cache, self._request = None, {}

    def _run(self, ids: Tensor) -> Tensor:
        output = self.module(decoder_input_ids=ids, use_cache=True, **{self._cache_name: self.cache}, **self._request)
        self.cache = output[self._cache_name]
        logits: Tensor = output.logits[:, -1]
        return logits
