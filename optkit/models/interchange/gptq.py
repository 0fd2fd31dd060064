"""GPTQ files as AutoGPTQ and GPTQModel write them (arXiv:2210.17323): 2, 4 or 8 bits, with or without act-order, versions 1 and 2.

Version 1 stores each zero point less one. Where act-order scatters a group's columns, the layer is dequantized; that is exact too.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import AliasChoices, BaseModel, Field
from torch import Tensor

from optkit.core.errors import ModelError
from optkit.models.interchange.grid import FLOATS, Found, Grid, Place, layer_of, refuse_shape, take
from optkit.models.interchange.words import bits_of, unpack_words

KEY = "qweight"


class Settings(BaseModel):
    """What ``quantization_config`` must say; the rest is read off the tensors."""

    bits: Literal[2, 3, 4, 8]
    group_size: int = Field(ge=-1)
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(default="gptq", validation_alias=AliasChoices("checkpoint_format", "format"))

    def refuse(self) -> None:
        """Refuse what is not read here.

        Raises:
            ModelError: names it.
        """
        if self.bits == 3:
            raise ModelError("GPTQ of 3 bits is not read here: its numbers straddle words; give a file of 2, 4 or 8 bits")
        if self.group_size == 0:
            raise ModelError("quantization_config.group_size is 0; expected -1 or a positive number")

    def read(self, parts: dict[str, Tensor], place: Place) -> Found:
        """Return the layer for the tensors ``qweight``, ``qzeros``, ``scales`` and, with act-order, ``g_idx``.

        Raises:
            ModelError: a tensor is missing, or of another shape or dtype.
        """
        words = take(parts, "qweight", place, (torch.int32,))
        packed_zeros = take(parts, "qzeros", place, (torch.int32,))
        scale = take(parts, "scales", place, FLOATS)
        if words.dim() != 2 or packed_zeros.dim() != 2 or scale.dim() != 2:
            raise ModelError(f"{place.name}: qweight, qzeros and scales must be matrices")
        bits = bits_of(words.shape[0], place.in_features, f"{place.name}.qweight")
        refuse_shape(words, (-(-place.in_features * bits // 32), place.out_features), f"{place.name}.qweight")
        refuse_shape(scale, (scale.shape[0], place.out_features), f"{place.name}.scales")
        refuse_shape(packed_zeros, (scale.shape[0], -(-place.out_features * bits // 32)), f"{place.name}.qzeros")
        stored = unpack_words(packed_zeros, bits)[:, : place.out_features]
        point = stored.to(torch.int16)
        if self.checkpoint_format == "gptq":
            if bool((stored == 2**bits - 1).any()):
                most = 2**bits - 1
                raise ModelError(
                    f"{place.name}.qzeros holds {most}, which loaders of version 1 read as 0 or as {most + 1}; save it as gptq_v2"
                )
            point = point + 1
        index = parts.pop("g_idx", None)
        if index is None:
            index = torch.arange(place.in_features) // (place.in_features if self.group_size == -1 else self.group_size)
        numbers = unpack_words(words.T.contiguous(), bits)[:, : place.in_features]
        grid = Grid(bits, numbers, point.T.contiguous(), scale.T.contiguous(), index)
        return layer_of(grid, parts.pop("bias", None), place)
