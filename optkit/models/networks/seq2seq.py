"""A small Transformer with an encoder and a decoder, of the T5 shape, for tasks that answer one text by another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from optkit.core.errors import ModelError
from optkit.core.subject import Kind
from optkit.models.networks.contract import Count, Network


class Seq2Seq(Network):
    """Raffel et al. 2019 (arXiv 1910.10683), small, as transformers builds it: the result opens in plain transformers."""

    kind: ClassVar[Kind] = "seq2seq-lm"
    hidden_size: Count = Field(default=128, description="width")
    layers: Count = Field(default=3, description="blocks of the encoder, and as many of the decoder")
    heads: Count = Field(default=4, description="attention heads")
    intermediate_size: Count = Field(default=512, description="width of the feed-forward layers")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the model.

        Raises:
            ModelError: the task wants no text as its answer, or the heads do not divide the width.
        """
        from transformers import T5Config, T5ForConditionalGeneration

        if needs.get("per") != "answer":
            raise ModelError(
                f"seq2seq answers texts by texts, and this task asks for answers per {needs.get('per', 'nothing')}; use another"
            )
        if self.hidden_size % self.heads:
            raise ModelError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        config = T5Config(
            vocab_size=needs["vocabulary"],
            d_model=self.hidden_size,
            d_kv=self.hidden_size // self.heads,
            d_ff=self.intermediate_size,
            num_layers=self.layers,
            num_decoder_layers=self.layers,
            num_heads=self.heads,
            pad_token_id=needs["end"],
            eos_token_id=needs["end"],
            decoder_start_token_id=needs["end"],
        )
        module: nn.Module = T5ForConditionalGeneration(config)
        return module
