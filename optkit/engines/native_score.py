"""What every engine answers besides generating, for the native step: logits of whole texts, and the bytes of its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from optkit.engines import native
from optkit.engines.held import held_bytes


class NativeEngine(native.NativeEngine):
    """The native step, and beside it ``score`` and ``cache_bytes``."""

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, by one forward of the model's own without a cache."""
        logits: Tensor = self.module(input_ids=input_ids, use_cache=False).logits
        return logits

    def cache_bytes(self) -> int:
        """Return the bytes of the request's keys and values, the room for later positions included."""
        return held_bytes((self._decoder.keys, self._decoder.values)) if self._decoder is not None and self._batch else 0
