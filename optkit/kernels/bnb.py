"""Linear layers of bitsandbytes: 4-bit blocks (NF4, FP4) and LLM.int8(). The arithmetic is theirs; what is saved stays exact.

On CPUs with AVX512-BF16 their 4-bit layer repacks its weight at the first forward and rounds the block maxima, for good. Here the
originals are kept beside it, so what is saved after a forward is what was quantized.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import MissingError, TransformError
from optkit.kernels.guards import dtype_named, refuse_non_finite, refuse_non_matrix

BLOCK_SIZES = (64, 128, 256, 512, 1024)
_NESTED_BLOCK, _TEXT_BYTES = 256, 256
_ROWS = 32  # their CPU kernel takes this many outputs at once, and stops at any other number


def bitsandbytes() -> Any:
    """Return the package, imported on first use: the one door to it.

    Its import would fetch compiled code from the Hub where the package ``kernels`` is installed; here it is not let.

    Raises:
        MissingError: it is not installed, or does not load on this machine.
    """
    if sys.modules.get("bitsandbytes") is not None:
        return sys.modules["bitsandbytes"]
    log, held = logging.getLogger("bitsandbytes"), sys.modules.get("kernels")
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(f"bitsandbytes is needed and does not load ({error}); pip install 'bitsandbytes>=0.48'") from None
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held


def refuse_sizes(in_features: int, out_features: int, block_size: int) -> None:
    """Refuse sizes that the 4-bit kernels of bitsandbytes cannot take.

    Raises:
        TransformError: a block would span two rows, or their CPU kernel would stop.
    """
    if in_features % block_size:
        fitting = [size for size in BLOCK_SIZES if in_features % size == 0]
        remedy = f"use block_size {fitting[-1]}" if fitting else "exclude this layer"
        raise TransformError(f"block_size {block_size} does not divide in_features {in_features}; {remedy}")
    if out_features % _ROWS:
        raise TransformError(f"out_features {out_features} is no multiple of {_ROWS}, which bitsandbytes needs on CPUs; exclude this layer")


class BitsandbytesLinear(nn.Linear):
    """What both layers share: buffers under the names that bitsandbytes and transformers save, and a layer of theirs that runs.

    It takes no part in training: weight and bias get no gradient, the input does.
    """

    saved: ClassVar[Mapping[str, str]]  # our buffers, and the names in a state
    compute_dtype: torch.dtype
    numbers: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, sizes: tuple[int, int], compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a float weight
        self.in_features, self.out_features = sizes
        self.compute_dtype = compute_dtype
        for name in self.saved:
            if name in tensors:
                self.register_buffer(name, tensors[name])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
        self._runner: tuple[Any, ...] = ()  # in a tuple, so that it is no child of this module

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty`` that make a layer of this shape, as JSON."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight (out_features, in_features) as bitsandbytes computes it."""

    @abstractmethod
    def _make_runner(self) -> Any: ...

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out_features, in_features) in ``compute_dtype``: a new tensor at every access, and it cannot be set."""
        return self.dequantize().to(self.compute_dtype)

    @property
    def weight_bytes(self) -> int:
        """The bytes that have to be read for one token: numbers, scales and bias."""
        return self._weight_bytes() + (0 if self.bias is None else self.bias.nbytes)

    @abstractmethod
    def _weight_bytes(self) -> int: ...

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b for an input (..., in_features), in its dtype, as the layer of bitsandbytes computes it."""
        if torch.is_grad_enabled() and input.requires_grad:
            return functional.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))
        if not self._runner:
            self._runner = (self._make_runner().eval(),)  # in either mode: their 4-bit layer rounds otherwise while it trains
        return self._run(self._runner[0], input)

    def _run(self, runner: Any, input: Tensor) -> Tensor:
        output: Tensor = runner(input)
        return output

    def restore(self) -> None:
        """Give up the layer of bitsandbytes; the next forward makes it anew."""
        self._runner = ()

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return ", ".join(f"{name}={value}" for name, value in self.layout().items())

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but keep the dtype of the quantized tensors: a change of dtype is for the bias and the results."""
        self.restore()
        before = dict(self._buffers)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.restore()
        for name, tensor in self._buffers.items():
            destination[prefix + self.saved[name]] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        self.restore()
        own = {prefix + saved: prefix + name for name, saved in self.saved.items()}
        told: list[str] = []
        renamed = {own.get(key, key): tensor for key, tensor in state.items() if key.startswith(prefix)}
        super()._load_from_state_dict(renamed, prefix, metadata, strict, told, unexpected, errors)
        theirs = {name: saved for saved, name in own.items()}
        missing += [theirs.get(name, name) for name in told]


class Bits4Linear(BitsandbytesLinear):
    """A linear layer in NF4 or FP4: sixteen values a block, scaled by the largest weight of the block (QLoRA, arXiv:2305.14314)."""

    saved: ClassVar[Mapping[str, str]] = {
        "numbers": "weight",
        "absmax": "weight.absmax",
        "quant_map": "weight.quant_map",
        "nested_absmax": "weight.nested_absmax",
        "nested_quant_map": "weight.nested_quant_map",
        "text": "weight.quant_state.bitsandbytes__{format}",
    }
    text: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        sizes: tuple[int, int],
        compute_dtype: torch.dtype,
        format: str = "nf4",
        block_size: int = 64,
    ) -> None:
        super().__init__(tensors, bias, sizes, compute_dtype)
        self.format, self.block_size, self.double_quant = format, block_size, "nested_absmax" in tensors
        self.saved = {name: saved.format(format=format) for name, saved in type(self).saved.items()}  # type: ignore[misc]

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, format: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> Self:
        """Return the layer for a float weight (out, in); it computes in the dtype of the weight.

        Raises:
            TransformError: the weight holds NaN or infinity, or has sizes that bitsandbytes cannot take.
            MissingError: bitsandbytes is not here.
        """
        refuse_non_matrix(weight)
        refuse_sizes(weight.shape[1], weight.shape[0], block_size)
        refuse_non_finite(weight)
        quantize = bitsandbytes().functional.quantize_4bit
        numbers, state = quantize(weight.detach().contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type=format)
        parts = state.as_dict(packed=True)
        text = parts.pop(f"quant_state.bitsandbytes__{format}")
        tensors = {name: tensor.clone() for name, tensor in parts.items()}  # the map is one tensor for all layers, and each saves its own
        tensors |= {"numbers": numbers, "text": functional.pad(text, (0, _TEXT_BYTES - len(text)), value=ord(" "))}
        return cls(tensors, bias, (weight.shape[1], weight.shape[0]), weight.dtype, format, block_size)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str = "float32",
        format: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        text_bytes: int = _TEXT_BYTES,
    ) -> Self:
        """Return a layer of zeros, to load a state into."""
        kind, blocks = dtype_named(dtype), in_features * out_features // block_size
        tensors = {
            "numbers": torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8),
            "absmax": torch.zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32),
            "quant_map": torch.zeros(16),
            "text": torch.zeros(text_bytes, dtype=torch.uint8),
        }
        if double_quant:
            tensors |= {"nested_absmax": torch.zeros(-(-blocks // _NESTED_BLOCK)), "nested_quant_map": torch.zeros(256)}
        return cls(tensors, torch.zeros(out_features, dtype=kind) if bias else None, (in_features, out_features), kind, format, block_size)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        kind = {"format": self.format, "double_quant": self.double_quant, "block_size": self.block_size}
        return {**sizes, "dtype": str(self.compute_dtype).removeprefix("torch."), **kind, "text_bytes": len(self.text)}

    def dequantize(self) -> Tensor:
        """Return the weight (out_features, in_features) as bitsandbytes computes it."""
        self.restore()
        found: Tensor = bitsandbytes().functional.dequantize_4bit(self.numbers, self._quant_state())
        return found

    def restore(self) -> None:
        """Go back to the saved layout of the numbers, in place of that of their CPU kernel."""
        if self._runner and self._buffers["numbers"] is None:
            self._buffers["numbers"] = self._runner[0].state_dict()["weight"]  # this undoes their repacking, which is exact for the numbers
        self._runner = ()

    def _weight_bytes(self) -> int:
        scales = (self._buffers.get(name) for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))
        return self.in_features * self.out_features // 2 + sum(tensor.nbytes for tensor in scales if tensor is not None)

    def _quant_state(self) -> Any:
        parts = {name: tensor.clone() for name, tensor in self._buffers.items() if tensor is not None and name not in ("numbers", "text")}
        text = json.loads(bytes(self.text.tolist()).decode())
        return bitsandbytes().functional.QuantState.from_dict(parts | text, device=self.text.device)

    def _make_runner(self) -> Any:
        layers, state = bitsandbytes().nn, self._quant_state()
        with torch.device("meta"):
            runner = layers.Linear4bit(self.in_features, self.out_features, bias=False, compute_dtype=self.compute_dtype)
        settings = {"blocksize": self.block_size, "compress_statistics": self.double_quant, "quant_type": self.format}
        runner.weight = layers.Params4bit(self.numbers, requires_grad=False, quant_state=state, bnb_quantized=True, **settings)
        runner.quant_state = state
        runner.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return runner

    def _run(self, runner: Any, input: Tensor) -> Tensor:
        output = super()._run(runner, input)
        if self._buffers["numbers"] is not None and getattr(runner.weight.quant_state, "packing_format_for_cpu", False):
            self._buffers["numbers"] = None  # never two layouts in memory for long
        return output
