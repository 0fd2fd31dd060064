"""Weight-only int8, one scale per output row. Activations are never integers, so accuracy is nearly free.

With AMX, products of many rows at once round float32 activations to bfloat16; steps of one token do not.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Linear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.quantize.packing import pack_layers, packer, selected


class Int8(Transform):
    """Linear layers, LSTMs and GRUs, the output head and an embedding tied to it, packed in 8 bits and run packed."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    targets: Targets = Field(default=Targets(), description="layers to quantize")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and weights that would be missed."""
        if not isinstance(plan.subject.module, nn.Linear):
            selected(plan.subject.module, self.targets, "int8", recurrent=True)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with packed layers."""
        if not isinstance(module, nn.Linear):
            selected(module, self.targets, "int8", recurrent=True)
        return pack_layers(module, self.targets, packer(Int8Linear), packer(Int8Linear), recurrent=True)
