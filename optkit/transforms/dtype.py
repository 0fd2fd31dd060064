"""Stores and computes in another floating-point type. Halves the bytes; whether it is faster depends on the machine."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from optkit.core.subject import Calibration
from optkit.transforms.contract import Plan, Stage, Transform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Dtype(Transform):
    """Cast parameters and saved buffers; layers that are packed already keep their integers."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="type to store and compute in")

    def check(self, plan: Plan) -> None:
        """Nothing to refuse: every module can be cast."""

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module, cast in place."""
        return cast(module, DTYPES[self.dtype])


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating parameters and persistent buffers in place.

    Buffers that are not saved, such as rotary frequencies, keep their precision, as they do when a saved model is opened.
    """
    for layer in module.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype  # type: ignore[assignment]
            own = {"bias"}
        else:
            own = {*layer._parameters, *layer._buffers} - layer._non_persistent_buffers_set
        for name in own:
            tensor = layer._parameters.get(name) if name in layer._parameters else layer._buffers.get(name)
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    config = getattr(module, "config", None)
    if config is not None:
        config.dtype = dtype
    return module
