"""4-bit blocks of bitsandbytes, NF4 or FP4, as QLoRA has them (arXiv:2305.14314). No data is needed; on CPUs it saves memory, not time.

The output head stays as it is unless asked for, and an embedding tied to it always does. Saved artefacts open in plain transformers
with bitsandbytes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.bnb import Bits4Linear, refuse_sizes
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.quantize.bits import check_layers, replace_layers


class Nf4(Transform):
    """Linear layers in 4-bit blocks by bitsandbytes; the output head stays unless asked for."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    format: Literal["nf4", "fp4"] = Field(default="nf4", description="the sixteen values: nf4 for normal weights, fp4 for floats of 4 bits")
    double_quant: bool = Field(default=True, description="store the scales of blocks in 8 bits too")
    block_size: Literal[64, 128, 256, 512, 1024] = Field(default=64, description="weights that share a scale")
    head: bool = Field(default=False, description="quantize the output head too; one that is tied to the embedding cannot be")
    targets: Targets = Field(default=Targets(), description="linear layers to quantize")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and sizes that bitsandbytes cannot take."""
        self._check_module(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with layers of bitsandbytes."""
        self._check_module(module)
        return replace_layers(module, self.targets, self.head, "nf4", self._pack)

    def _check_module(self, module: nn.Module) -> None:
        check_layers(module, self.targets, self.head, "nf4", lambda columns, rows: refuse_sizes(columns, rows, self.block_size))

    def _pack(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        if not weight.is_meta:
            return Bits4Linear.from_weight(weight, bias, self.format, self.double_quant, self.block_size)
        dtype = str(weight.dtype).removeprefix("torch.")
        settings = {"format": self.format, "double_quant": self.double_quant, "block_size": self.block_size}
        with weight.device:
            return Bits4Linear.empty(weight.shape[1], weight.shape[0], bias is not None, dtype, **settings)  # type: ignore[arg-type]
