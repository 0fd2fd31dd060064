"""A small decoder of the GPT-2 shape, which goes on with texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from optkit.core.errors import ModelError
from optkit.core.subject import Kind
from optkit.models.networks.contract import Count, Network


class Gpt2(Network):
    """Radford et al. 2019 (Language Models are Unsupervised Multitask Learners), small, as transformers builds it."""

    kind: ClassVar[Kind] = "causal-lm"
    hidden_size: Count = Field(default=256, description="width")
    layers: Count = Field(default=4, description="blocks")
    heads: Count = Field(default=4, description="attention heads")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the model.

        Raises:
            ModelError: the task has no text to go on with, or the heads do not divide the width.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        if needs.get("per") != "text":
            raise ModelError(
                f"gpt2 goes on with texts, and this task asks for answers per {needs.get('per', 'nothing')}; use another network"
            )
        if self.hidden_size % self.heads:
            raise ModelError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        config = GPT2Config(
            vocab_size=needs["vocabulary"],
            n_positions=needs["positions"],
            n_embd=self.hidden_size,
            n_layer=self.layers,
            n_head=self.heads,
            bos_token_id=needs["end"],
            eos_token_id=needs["end"],
        )
        module: nn.Module = GPT2LMHeadModel(config)
        return module
