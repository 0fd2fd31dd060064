"""A small Transformer encoder of the BERT shape, with a head for one class a text, one a token, or the ends of a piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from optkit.core.errors import ModelError
from optkit.models.networks.contract import Count, Network


class Encoder(Network):
    """Devlin et al. 2018 (arXiv 1810.04805), small, as transformers builds it: the result opens in plain transformers."""

    hidden_size: Count = Field(default=128, description="width")
    layers: Count = Field(default=3, description="blocks")
    heads: Count = Field(default=4, description="attention heads")
    intermediate_size: Count = Field(default=512, description="width of the feed-forward layers")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return a classifier of texts or tokens, or one that marks pieces.

        Raises:
            ModelError: the task asks for neither, or the heads do not divide the width.
        """
        from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

        kinds = {"item": BertForSequenceClassification, "token": BertForTokenClassification, "span": BertForQuestionAnswering}
        if needs.get("per") not in kinds:
            raise ModelError("encoder gives classes to texts or to tokens, or marks pieces, and this task asks for something else")
        if self.hidden_size % self.heads:
            raise ModelError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        config = BertConfig(
            vocab_size=needs["vocabulary"],
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=needs["positions"],
            **_classes(needs.get("labels", ())),
        )
        module: nn.Module = kinds[needs["per"]](config)
        return module


def _classes(labels: Sequence[str]) -> dict[str, Any]:
    numbers = {label: number for number, label in enumerate(labels)}
    return {"id2label": {number: label for label, number in numbers.items()}, "label2id": numbers} if labels else {}
