"""A variant of a model that serves beside it: fewer blocks, another type, fewer bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from optkit.core.settings import Settings
from optkit.transforms.contract import Plan
from optkit.transforms.dtype import Dtype
from optkit.transforms.prune.drop_layers import DropLayers
from optkit.transforms.quantize.int4 import Int4
from optkit.transforms.quantize.int8 import Int8

Position = Annotated[int, Field(ge=0)]


class Variant(Settings):
    """What is done to the untouched model. Nothing of it needs data."""

    drop_layers: tuple[Position, ...] = Field(default=(), description="positions of blocks to leave out, counted from 0")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="type to compute in; default: as stored")
    bits: Literal[8, 4] | None = Field(default=None, description="bits of weights, by rounding; default: floats")

    def check(self, plan: Plan) -> None:
        """Refuse blocks that are not there.

        Raises:
            TransformError: with the numbers.
        """
        if self.drop_layers:
            DropLayers(layers=self.drop_layers).check(plan)

    def of(self, module: nn.Module) -> nn.Module:
        """Return the variant of an untouched module, which is used up."""
        if self.drop_layers:
            module = DropLayers(layers=self.drop_layers).apply(module)
        if self.dtype is not None:
            module = Dtype(dtype=self.dtype).apply(module)
        if self.bits is not None:
            module = (Int8() if self.bits == 8 else Int4()).apply(module)
        return module
