"""LLM.int8() of bitsandbytes: int8 rows and int8 activations, but columns with an outlier in float (arXiv:2208.07339)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from optkit.kernels.bnb import BitsandbytesLinear, bitsandbytes
from optkit.kernels.guards import dtype_named, refuse_non_finite, refuse_non_matrix

_CASTS = "MatMul8bitLt: inputs will be cast"
_THEIR_LOG = logging.getLogger("bitsandbytes.autograd._functions")


class LlmInt8Linear(BitsandbytesLinear):
    """A linear layer of LLM.int8(): int8 rows and int8 activations, but columns with an outlier in float (arXiv:2208.07339)."""

    saved: ClassVar[Mapping[str, str]] = {"numbers": "weight", "scale": "SCB", "order": "weight_format"}
    scale: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], bias: Tensor | None, sizes: tuple[int, int], compute_dtype: torch.dtype, threshold: float = 6.0
    ) -> None:
        super().__init__(tensors, bias, sizes, compute_dtype)
        self.threshold = threshold

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, threshold: float = 6.0) -> Self:
        """Return the layer for a float weight (out, in), which is rounded to float16 on the way, as bitsandbytes does.

        Raises:
            TransformError: the weight holds NaN or infinity, or what float16 cannot hold.
            MissingError: bitsandbytes is not here.
        """
        refuse_non_matrix(weight)
        half = weight.detach().to(torch.float16).contiguous()
        refuse_non_finite(half)
        numbers, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(half)
        tensors = {"numbers": numbers, "scale": scale, "order": torch.tensor(0, dtype=torch.uint8)}
        return cls(tensors, bias, (weight.shape[1], weight.shape[0]), weight.dtype, threshold)

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: bool = True, dtype: str = "float32", threshold: float = 6.0) -> Self:
        """Return a layer of zeros, to load a state into."""
        kind = dtype_named(dtype)
        tensors = {
            "numbers": torch.zeros(out_features, in_features, dtype=torch.int8),
            "scale": torch.zeros(out_features),
            "order": torch.zeros((), dtype=torch.uint8),
        }
        return cls(tensors, torch.zeros(out_features, dtype=kind) if bias else None, (in_features, out_features), kind, threshold)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return {**sizes, "dtype": str(self.compute_dtype).removeprefix("torch."), "threshold": self.threshold}

    def dequantize(self) -> Tensor:
        """Return the weight (out_features, in_features): numbers * scale / 127."""
        found: Tensor = bitsandbytes().functional.int8_vectorwise_dequant(self.numbers, self.scale)
        return found

    def _weight_bytes(self) -> int:
        return self.out_features * (self.in_features + 4)

    def _make_runner(self) -> Any:
        layers = bitsandbytes().nn
        with torch.device("meta"):
            runner = layers.Linear8bitLt(self.in_features, self.out_features, bias=False, has_fp16_weights=False, threshold=self.threshold)
        runner.weight = layers.Int8Params(
            self.numbers, requires_grad=False, has_fp16_weights=False, CB=self.numbers, SCB=self.scale.clone()
        )
        runner.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return runner

    def _run(self, runner: Any, input: Tensor) -> Tensor:
        _THEIR_LOG.addFilter(_without_casts)  # there it is one filter, however often it is added
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_CASTS)  # versions before 0.50 say it this way
            return super()._run(runner, input)


def _without_casts(record: logging.LogRecord) -> bool:
    """Drop what they say at every call: that activations are rounded to float16. It is the method, and stands in the transform."""
    return not str(record.msg).startswith(_CASTS)
