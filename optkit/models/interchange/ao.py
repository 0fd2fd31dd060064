"""torchao files in safetensors, as transformers saves them: whole numbers of 4 or 8 bits by row or in groups, activations in float."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from optkit.core.errors import ModelError
from optkit.models.interchange.grid import FLOATS, Found, Grid, Place, layer_of, refuse_shape, take

KEY = "_weight_qdata"
_WIDTHS = {"int4": 4, "int8": 8}


class Settings(BaseModel):
    """What ``quantization_config`` must say; the rest is read off the tensors."""

    quant_type: dict[str, Any]

    def refuse(self) -> None:
        """Refuse what is not read here.

        Raises:
            ModelError: names it.
        """
        self._bits()

    def read(self, parts: dict[str, Tensor], place: Place) -> Found:
        """Return the layer for the numbers, one a byte, with scales and zero points by row or group.

        Raises:
            ModelError: a tensor is missing, or of another shape or dtype.
        """
        bits = self._bits()
        signed = take(parts, "_weight_qdata", place, (torch.int8,))
        scale = take(parts, "_weight_scale", place, FLOATS)
        refuse_shape(signed, (place.out_features, place.in_features), f"{place.name}._weight_qdata")
        if scale.dim() != 2 or not scale.shape[1] or place.in_features % scale.shape[1]:
            raise ModelError(f"{place.name}: scales of shape {tuple(scale.shape)} do not fit {place.in_features} inputs")
        half = 2 ** (bits - 1)
        if not signed.is_meta and (int(signed.min()) < -half or int(signed.max()) >= half):
            raise ModelError(f"{place.name}: numbers beyond {bits} bits")
        point = torch.full(scale.shape, half, dtype=torch.int16)
        if "_weight_zero_point" in parts:
            point = point + take(parts, "_weight_zero_point", place, (torch.int8, torch.int32, torch.int64)).reshape(scale.shape)
        index = torch.arange(place.in_features) // (place.in_features // scale.shape[1])
        grid = Grid(bits, (signed.to(torch.int16) + half).to(torch.uint8), point, scale, index)
        return layer_of(grid, parts.pop("bias", None), place)

    def _bits(self) -> int:
        for name, kind in self.quant_type.items():
            told = kind if isinstance(kind, dict) else {"_type": kind}
            data = told.get("_data") if isinstance(told.get("_data"), dict) else {}
            width = data.get("weight_dtype") if isinstance(data, dict) else None
            if name == "default" and told.get("_type") == "Int8WeightOnlyConfig":
                return 8
            if (
                name == "default"
                and told.get("_type") == "IntxWeightOnlyConfig"
                and isinstance(width, dict)
                and width.get("_data") in _WIDTHS
            ):
                return _WIDTHS[str(width["_data"])]
            raise ModelError(
                f"torchao {told.get('_type')!r} is not read here; known: Int8WeightOnlyConfig, IntxWeightOnlyConfig of int4 or int8"
            )
        raise ModelError("torchao quant_type is empty")
