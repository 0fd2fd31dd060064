"""A classifier of texts: embeddings, an LSTM in both directions, the mean over the tokens that are there, one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from optkit.models.networks.contract import Count, Network
from optkit.models.networks.needs import for_items


class Bilstm(Network):
    """Hochreiter and Schmidhuber 1997 (https://doi.org/10.1162/neco.1997.9.8.1735), in both directions."""

    embedding_size: Count = Field(default=128, description="width of the embedding")
    hidden_size: Count = Field(default=128, description="units of each direction")

    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the classifier."""
        vocabulary, labels = for_items(needs, "bilstm")
        return BilstmClassifier(vocabulary, self.embedding_size, self.hidden_size, len(labels))


class BilstmClassifier(nn.Module):
    """Takes token ids (b, t) and their mask (b, t), and returns logits (b, classes)."""

    def __init__(self, vocabulary: int, embedding_size: int, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.dropout = nn.Dropout(0.3)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits."""
        states, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        mask = attention_mask[..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits
