"""Models of a named size with random weights: real speed and memory without a download. Their quality means nothing and is withheld."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from optkit.core.settings import Settings

Size = Annotated[int, Field(ge=1, le=1_000_000)]


class Shape(Settings):
    """The numbers of a decoder. ``kv_heads`` and ``intermediate_size`` default to the family's habit."""

    family: Literal["llama", "qwen2", "gpt2"] = Field(default="llama", description="architecture")
    layers: Size = Field(description="number of blocks")
    hidden_size: Size = Field(description="width of the residual stream")
    heads: Size = Field(description="attention heads")
    kv_heads: Size | None = Field(default=None, description="key and value heads; default: as many as heads")
    intermediate_size: Size | None = Field(default=None, description="width of the feed-forward layer; default: four times hidden_size")
    vocabulary: Size = Field(description="number of token ids")
    tied: bool = Field(default=True, description="whether the output head is the embedding")
    max_positions: Size = Field(default=2048, description="longest sequence")


SHAPES: dict[str, Shape] = {
    "llama-1m": Shape(layers=4, hidden_size=128, heads=4, kv_heads=2, intermediate_size=384, vocabulary=4096, max_positions=4096),
    "llama-5m": Shape(layers=4, hidden_size=256, heads=4, kv_heads=2, intermediate_size=704, vocabulary=8192, max_positions=4096),
    "llama-25m": Shape(layers=8, hidden_size=448, heads=7, intermediate_size=1216, vocabulary=16384, max_positions=4096),
    "llama-260m": Shape(layers=20, hidden_size=1024, heads=16, kv_heads=4, intermediate_size=2816, vocabulary=32000, max_positions=4096),
    "llama-135m": Shape(layers=30, hidden_size=576, heads=9, kv_heads=3, intermediate_size=1536, vocabulary=49152),
    "llama-1b": Shape(layers=22, hidden_size=2048, heads=32, kv_heads=4, intermediate_size=5632, vocabulary=32000, tied=False),
    "gpt2": Shape(family="gpt2", layers=12, hidden_size=768, heads=12, vocabulary=50257, max_positions=1024),
    "qwen2.5-0.5b": Shape(family="qwen2", layers=24, hidden_size=896, heads=14, kv_heads=2, intermediate_size=4864, vocabulary=151936),
}


def config_of(shape: Shape) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    if shape.family == "gpt2":
        return GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.hidden_size,
            n_head=shape.heads,
            n_inner=shape.intermediate_size,
            vocab_size=shape.vocabulary,
            n_positions=shape.max_positions,
            tie_word_embeddings=shape.tied,
        )
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    return kind(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
    )
