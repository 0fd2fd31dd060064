"""Generation by several stages, each a process: micro-batches follow one another through them, and only token ids travel back.

Caches of keys and values stay with their stage. A stage begins the next token of a micro-batch as soon as its last one is known, so stages
wait at the beginning and at the end of a request alone. (The schedules of ``torch.distributed.pipelining`` take whole forwards of one
shape, and keep no cache between them; the point to point messages of a process group, on which they stand, are used here too.)
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optkit.core.errors import ArmError
from optkit.engines.eager import cache_name
from optkit.engines.held import held_bytes
from optkit.engines.parallel.part import Part


class PipelineEngine:
    """One stage of a generating model. All stages make the same calls; all of them return the same."""

    def __init__(self, module: Any, part: Part) -> None:
        self.module = module.eval()
        self.part = part
        self.waited_s = 0.0
        self._width = int(module.config.hidden_size)
        self._vocabulary = part.vocabulary or int(module.config.vocab_size)
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self._cache_name = cache_name(module)
        only_last = part.is_last and "logits_to_keep" in inspect.signature(module.forward).parameters
        self._keep = {"logits_to_keep": 1} if only_last else {}
        self._caches: list[Any] = []
        self._tokens: list[Tensor] = []  # of each micro-batch, the last ones known here
        self._under_way: list[Any] = []

    @torch.inference_mode()
    def first(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the caches and return the (b,) most likely next tokens."""
        parts = self._begin(input_ids)
        for index, ids in enumerate(parts):
            self._choose(index, self._turn(index, ids))
        return self._collected()

    def further(self, token_ids: Tensor, count: int) -> Iterator[Tensor]:
        """Go on from (b,) tokens, and yield the (b,) next ones so many times.

        Stages before the last learn of a token while they work at the next one, and yield it then.
        """
        self._tokens = list(token_ids.split([len(tokens) for tokens in self._tokens]))
        for step in range(count):
            for index in range(len(self._tokens)):
                if step and self.part.is_first:
                    self._tokens[index] = self._token(index)
                with torch.inference_mode():
                    self._choose(index, self._turn(index, self._tokens[index][:, None]))
            if self.part.is_last:
                yield torch.cat(self._tokens)
            elif step:
                yield torch.cat(self._tokens) if self.part.is_first else self._collected()
        if count and not self.part.is_last:
            yield self._collected()
        self._settle()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take (b, p) input ids, fill the caches and return the (b, v) logits of the last position, sent to every stage."""
        return self._logits(self._begin(input_ids))

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Take (b,) token ids, one for each sequence, and return their (b, v) logits, sent to every stage."""
        return self._logits([ids[:, None] for ids in token_ids.split([len(tokens) for tokens in self._tokens])])

    @torch.inference_mode()
    def score(self, input_ids: Tensor) -> Tensor:
        """Return the (b, t, v) logits of (b, t) input ids, sent to every stage; no cache takes part."""
        given = {"input_ids": input_ids} if self.part.is_first else {"inputs_embeds": self._receive(self._hidden(input_ids))}
        output = self.module(**given, use_cache=False).logits
        if not self.part.is_last:
            self._send(output, self.part.place.pipeline + 1)
            output = torch.empty(*input_ids.shape, self._vocabulary)
        return self._told(output)

    def cache_bytes(self) -> int:
        """Return the bytes of this stage's keys and values."""
        return sum(held_bytes(cache) for cache in self._caches)

    def reset(self) -> None:
        """Forget the caches."""
        self._caches, self._tokens = [], []

    def _begin(self, input_ids: Tensor) -> Sequence[Tensor]:
        parts = input_ids.tensor_split(min(self.part.micro_batches, len(input_ids)))
        self._caches, self._tokens = [None] * len(parts), [ids[:, -1] for ids in parts]
        return parts

    def _turn(self, index: int, ids: Tensor) -> Tensor:
        """Do this stage's work for one micro-batch: take (b, t) ids or hidden states in, and give hidden states or logits."""
        given = {"input_ids": ids} if self.part.is_first else {"inputs_embeds": self._receive(self._hidden(ids))}
        output = self.module(**given, use_cache=True, **{self._cache_name: self._caches[index]}, **self._keep)
        self._caches[index] = output[self._cache_name]
        found: Tensor = output.logits
        if not self.part.is_last:
            self._send(found, self.part.place.pipeline + 1)
        return found

    def _choose(self, index: int, output: Tensor) -> None:
        if self.part.is_last:
            self._tokens[index] = output[:, -1].argmax(-1)
            for stage in range(self.part.mesh.pipeline - 1):
                self._send(self._tokens[index], stage)

    def _logits(self, parts: Sequence[Tensor]) -> Tensor:
        outputs = [self._turn(index, ids) for index, ids in enumerate(parts)]
        rows = sum(len(ids) for ids in parts)
        whole = torch.cat([output[:, -1] for output in outputs]) if self.part.is_last else torch.empty(rows, self._vocabulary)
        return self._told(whole)

    def _collected(self) -> Tensor:
        """Return the tokens of all micro-batches, as the last stage has sent them."""
        if not self.part.is_last:
            self._tokens = [self._token(index) for index in range(len(self._tokens))]
        self._settle()
        return torch.cat(self._tokens)

    def _token(self, index: int) -> Tensor:
        return self._receive(torch.empty_like(self._tokens[index]), self.part.mesh.pipeline - 1)

    def _hidden(self, ids: Tensor) -> Tensor:
        return torch.empty(*ids.shape, self._width)

    def _send(self, tensor: Tensor, stage: int) -> None:
        import torch.distributed as dist

        plain = tensor.float() if tensor.is_floating_point() else tensor
        plain = plain.contiguous()
        self._under_way.append((dist.isend(plain, group=self.part.line, group_dst=stage), plain))

    def _receive(self, into: Tensor, stage: int | None = None) -> Tensor:
        import torch.distributed as dist

        source = self.part.place.pipeline - 1 if stage is None else stage
        start = time.perf_counter()
        try:
            dist.recv(into, group=self.part.line, group_src=source)
        except RuntimeError as error:
            raise ArmError(f"stage {source} sends nothing: {error}") from None
        self.waited_s += time.perf_counter() - start
        return into.to(self._dtype) if into.is_floating_point() else into

    def _told(self, whole: Tensor) -> Tensor:
        """Return what the last stage has."""
        import torch.distributed as dist

        self._settle()
        wide = whole.float().contiguous()
        dist.broadcast(wide, group=self.part.line, group_src=self.part.mesh.pipeline - 1)
        return wide.to(self._dtype)

    def _settle(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()
