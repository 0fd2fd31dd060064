"""Int8 weights, one scale per output row; activations stay floats unless asked for, and then accuracy is no longer nearly free.

With AMX or AVX512-BF16, weight-only products of many rows at once round float32 activations to bfloat16; steps of one token do not.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import is_on_meta, output_head, tied_embedding
from optkit.transforms.quantize.activations import static_scales
from optkit.transforms.quantize.embedding import pack_embedding, refuse_embedding
from optkit.transforms.quantize.packing import RECURRENT, Pack, bias_of, pack_layers, pack_named, packer, selected


class Int8(Transform):
    """Linear layers, LSTMs, GRUs, the output head and an embedding tied to it, packed in 8 bits; on request with 8-bit activations."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    activations: Literal["none", "dynamic", "static"] = Field(
        default="none",
        description="inputs of the layers: none keeps floats, dynamic rounds each token to int8 by its largest value, "
        "static by one scale a layer from calibration data",
    )
    head: Literal["int8", "w8a8"] = Field(
        default="int8",
        description="the output head keeps float inputs, or takes part in activations (w8a8); one that is tied to the embedding keeps them",
    )
    embedding: bool = Field(default=False, description="pack an input embedding that is not tied to the head, too")
    targets: Targets = Field(default=Targets(), description="layers to quantize")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.head == "w8a8" and self.activations == "none":
            raise ValueError("head: w8a8 rounds the head's input, and activations: none rounds no input; set activations to dynamic")
        return self

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed only for static activations."""
        return self.activations == "static"

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing, weights that would be missed, and settings that would have no effect."""
        self._check_module(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with packed layers."""
        layers = self._check_module(module)
        rounding = self._rounding(module, layers)
        static = self.activations == "static" and not is_on_meta(module)
        scales = static_scales(module, rounding, data, "int8 with static activations") if static else {}
        plain = packer(Int8Linear)
        if isinstance(module, nn.Linear):
            return (self._pack(scales.get("")) if rounding else plain)(module.weight.detach(), bias_of(module))
        if type(module) in RECURRENT:
            return pack_layers(module, self.targets, plain, plain, recurrent=True)
        rest = [name for name in layers if name not in rounding]
        del layers  # so that each float weight goes when its layer is packed
        pack_named(module, rest, plain, plain)
        for name in rounding:
            pack = self._pack(scales.get(name))
            pack_named(module, [name], pack, pack)
        return pack_embedding(module) if self.embedding else module

    def _check_module(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to pack; a bare linear layer has the empty name."""
        layers: dict[str, nn.Module] = (
            {"": module} if isinstance(module, nn.Linear) else selected(module, self.targets, "int8", recurrent=True)
        )
        if self.embedding:
            refuse_embedding(module, self.targets, "int8")
        if self.head == "w8a8":
            head = output_head(module)
            if head is None or head not in layers or tied_embedding(module, layers[head]) is not None:
                why = "is tied to the embedding and keeps float inputs" if head in layers else "is not among the layers to quantize"
                raise TransformError(f"head: w8a8 has no effect: the head {why}; leave the setting out")
        return layers

    def _rounding(self, module: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
        """Return the layers whose inputs are rounded."""
        if self.activations == "none":
            return []
        head = output_head(module) if self.head == "int8" else None
        return [
            name
            for name, layer in layers.items()
            if name != head and type(layer) not in RECURRENT and tied_embedding(module, layer) is None
        ]

    def _pack(self, scale: float | None) -> Pack:
        def pack(weight: Tensor, bias: Tensor | None) -> nn.Linear:
            if not weight.is_meta:
                return W8A8Linear.from_weight(weight, bias, scale)
            with weight.device:
                dtype = str(weight.dtype).removeprefix("torch.")
                static = self.activations == "static"
                return W8A8Linear.empty(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, static=static)

        return pack
