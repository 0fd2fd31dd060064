"""Weight-only int4 in groups along the input, rounded to nearest after a search for the best clipping. No data is needed."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import output_head, tied_embedding, weight_of
from optkit.transforms.quantize.embedding import pack_embedding, refuse_embedding
from optkit.transforms.quantize.packing import pack_layers, packer, selected

GROUP_SIZES = (32, 64, 128)


class Int4(Transform):
    """Linear layers packed in 4 bits and run packed; a scale and a zero point for each group of inputs."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    group_size: Literal[32, 64, 128] = Field(default=64, description="inputs that share a scale")
    head: Literal["int8", "int4"] = Field(
        default="int8", description="format of the output head; one that is tied to the embedding is always int8"
    )
    embedding: bool = Field(default=False, description="pack an input embedding that is not tied to the head, in int8")
    targets: Targets = Field(default=Targets(), description="linear layers to quantize")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and groups that do not divide; all such layers are counted, the first is named."""
        self._check_module(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with packed layers."""
        self._check_module(module)
        pack = packer(Int4Linear, group_size=self.group_size)
        packed = pack_layers(module, self.targets, pack, pack if self.head == "int4" else packer(Int8Linear))
        return pack_embedding(packed) if self.embedding else packed

    def _check_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            layers: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            layers = selected(module, self.targets, "int4")
        if self.embedding:
            refuse_embedding(module, self.targets, "int4")
        head = output_head(module)
        eight_bit = {name for name in layers if (name == head and self.head == "int8") or tied_embedding(module, layers[name])}
        widths = {name: weight_of(layer).shape[1] for name, layer in layers.items() if name not in eight_bit}
        odd = {name: width for name, width in widths.items() if width % self.group_size}
        if odd:
            name, width = next(iter(odd.items()))
            fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths.values())]
            advice = (
                f"use group_size {' or '.join(map(str, fitting))}" if fitting else f"exclude such layers: targets: {{exclude: ['{name}']}}"
            )
            raise TransformError(
                f"group_size {self.group_size} does not divide in_features {width} of {name} ({len(odd)} of {len(layers)} layers); {advice}"
            )
