"""Packed layers with compiled kernels, each beside its plain PyTorch reference. For inference: the packed weights get no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

LAYERS: Registry[nn.Module] = Registry(
    "layer",
    {
        "int8_linear": "optkit.kernels.int8:Int8Linear",
        "int8_embedding": "optkit.kernels.int8:Int8Embedding",
        "int8_lstm": "optkit.kernels.lstm:Int8LSTM",
        "int8_gru": "optkit.kernels.gru:Int8GRU",
        "int4_linear": "optkit.kernels.int4:Int4Linear",
        "w8a8_linear": "optkit.kernels.w8a8:W8A8Linear",
        "bits4_linear": "optkit.kernels.bnb:Bits4Linear",
        "low_rank_linear": "optkit.kernels.low_rank:LowRankLinear",
        "sparse_linear": "optkit.kernels.sparse:SparseLinear",
        "llm_int8_linear": "optkit.kernels.llm_int8:LlmInt8Linear",
    },
)

__all__ = ["LAYERS"]
