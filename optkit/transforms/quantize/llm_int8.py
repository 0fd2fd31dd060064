"""LLM.int8() of bitsandbytes: int8 weights and activations, outlier columns in float (arXiv:2208.07339). On CPUs it saves memory, not time.

The output head stays as it is unless asked for, and an embedding tied to it always does. Saved artefacts open in plain transformers
with bitsandbytes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.llm_int8 import LlmInt8Linear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.quantize.bits import check_layers, replace_layers


class LlmInt8(Transform):
    """Linear layers in int8 by bitsandbytes, activations too, but outlier columns in float; the output head stays unless asked for."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    threshold: float = Field(default=6.0, ge=0, description="columns with an activation beyond it are computed in float; 0 for none")
    head: bool = Field(default=False, description="quantize the output head too; one that is tied to the embedding cannot be")
    targets: Targets = Field(default=Targets(), description="linear layers to quantize")

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and weights that would be missed."""
        check_layers(plan.subject.module, self.targets, self.head, "llm_int8")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with layers of bitsandbytes."""
        check_layers(module, self.targets, self.head, "llm_int8")
        return replace_layers(module, self.targets, self.head, "llm_int8", self._pack)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        if not weight.is_meta:
            return LlmInt8Linear.from_weight(weight, bias, self.threshold)
        dtype = str(weight.dtype).removeprefix("torch.")
        with weight.device:
            return LlmInt8Linear.empty(weight.shape[1], weight.shape[0], bias is not None, dtype, self.threshold)
