"""AWQ files as AutoAWQ writes them (arXiv:2306.00978): 4 bits, layout ``gemm``, which shuffles the numbers within each word."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from optkit.core.errors import ModelError
from optkit.models.interchange.grid import FLOATS, Found, Grid, Place, layer_of, refuse_shape, take
from optkit.models.interchange.words import unpack_words

KEY = "qweight"
_UNSHUFFLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight neighbours stands


class Settings(BaseModel):
    """What ``quantization_config`` must say; the rest is read off the tensors."""

    bits: Literal[4]
    group_size: int = Field(ge=-1)
    version: Literal["gemm"] = "gemm"

    @field_validator("version", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    def refuse(self) -> None:
        """Refuse what is not read here.

        Raises:
            ModelError: names it.
        """
        if self.group_size == 0:
            raise ModelError("quantization_config.group_size is 0; expected -1 or a positive number")

    def read(self, parts: dict[str, Tensor], place: Place) -> Found:
        """Return the layer for the tensors ``qweight`` (in, out / 8), ``qzeros`` (groups, out / 8) and ``scales`` (groups, out).

        Raises:
            ModelError: a tensor is missing, or of another shape or dtype.
        """
        words = take(parts, "qweight", place, (torch.int32,))
        packed_zeros = take(parts, "qzeros", place, (torch.int32,))
        scale = take(parts, "scales", place, FLOATS)
        size = place.in_features if self.group_size == -1 else self.group_size
        groups = -(-place.in_features // size)
        if place.out_features % 8:
            raise ModelError(f"{place.name} has {place.out_features} outputs; AWQ packs multiples of 8")
        refuse_shape(words, (place.in_features, place.out_features // 8), f"{place.name}.qweight")
        refuse_shape(packed_zeros, (groups, place.out_features // 8), f"{place.name}.qzeros")
        refuse_shape(scale, (groups, place.out_features), f"{place.name}.scales")
        numbers, point = (_unshuffle(unpack_words(packed, 4)).T.contiguous() for packed in (words, packed_zeros))
        grid = Grid(4, numbers, point, scale.T.contiguous(), torch.arange(place.in_features) // size)
        return layer_of(grid, parts.pop("bias", None), place)


def _unshuffle(numbers: Tensor) -> Tensor:
    """Return numbers (rows, columns) in the order of the columns."""
    return numbers.reshape(len(numbers), -1, 8)[:, :, list(_UNSHUFFLE)].flatten(1)
