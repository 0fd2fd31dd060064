"""A small Transformer with an encoder and a decoder, of the shape of T5 or BART, for tasks that answer one text by another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import ModelError
from optkit.core.subject import Kind
from optkit.models.networks.contract import Count, Network

_SPREAD = 0.05  # of weights at first; with the 0.02 of large models a small one learns late


class Seq2Seq(Network):
    """T5 (Raffel et al. 2019, arXiv 1910.10683) or BART (Lewis et al. 2019, arXiv 1910.13461), small: the result opens in transformers.

    T5 knows how far tokens are from each other, BART where they stand: a short training teaches it sooner to repeat words of the text.
    """

    kind: ClassVar[Kind] = "seq2seq-lm"
    shape: Literal["t5", "bart"] = Field(default="t5", description="whose architecture")
    hidden_size: Count = Field(default=128, description="width")
    layers: Count = Field(default=3, description="blocks of the encoder, and as many of the decoder")
    heads: Count = Field(default=4, description="attention heads")
    intermediate_size: Count = Field(default=512, description="width of the feed-forward layers")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the model.

        Raises:
            ModelError: the task wants no text as its answer, or the heads do not divide the width.
        """
        if needs.get("per") != "answer":
            raise ModelError(
                f"seq2seq answers texts by texts, and this task asks for answers per {needs.get('per', 'nothing')}; use another"
            )
        if self.hidden_size % self.heads:
            raise ModelError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        tokens = {name: needs["end"] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
        known = {"vocab_size": needs["vocabulary"], "d_model": self.hidden_size, **tokens}
        return self._t5(known) if self.shape == "t5" else self._bart(known, needs["positions"])

    def _t5(self, known: dict[str, Any]) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        depths = dict.fromkeys(("num_layers", "num_decoder_layers"), self.layers)
        sizes = {"d_kv": self.hidden_size // self.heads, "d_ff": self.intermediate_size, "num_heads": self.heads}
        module: nn.Module = T5ForConditionalGeneration(T5Config(**known, **depths, **sizes))
        return module

    def _bart(self, known: dict[str, Any], positions: int) -> nn.Module:
        from transformers import BartConfig, BartForConditionalGeneration

        sizes = {"layers": self.layers, "attention_heads": self.heads, "ffn_dim": self.intermediate_size}
        sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
        module: nn.Module = BartForConditionalGeneration(
            BartConfig(
                **known,
                **sides,
                bos_token_id=known["eos_token_id"],
                forced_eos_token_id=None,
                max_position_embeddings=positions,
                scale_embedding=True,
                init_std=_SPREAD,
            )
        )
        return module
