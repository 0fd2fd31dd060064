"""Steps of one token without Python between the layers. Weights stay as they are; the first request pays for the compilation.

Small models profit most: between the operators of a plain forward some 0.35 ms of Python pass in every block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines.native import refusal, refuse_compiled_cache, refuse_compiled_window
from optkit.transforms.contract import Plan, Stage, Transform


class Compile(Transform):
    """Run each step as one call: of optkit's kernels for decoders of the Llama kind, else of one graph by torch.compile."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "compile chooses the engine of a subject, and a bare module has none; wrap the module by torch.compile, or generate "
        "with optkit.engines.NativeEngine or CompiledEngine"
    )
    backend: Literal["auto", "native", "inductor"] = Field(
        default="auto", description="native: optkit's own step; inductor: torch.compile; auto: native where it knows the model"
    )

    def check(self, plan: Plan) -> None:
        """Refuse the native step where it does not know the model, a second compile, and a quantized cache that it cannot keep."""
        if any(step.name == self.step().name for step in plan.subject.history):
            raise TransformError("the model is compiled already; name compile once")
        beside = next((step.name for step in plan.subject.history if step.name in ("draft", "adaptive")), None)
        if beside is not None:
            remedy = "name compile before it" if beside == "adaptive" else "leave compile out"
            raise TransformError(f"{beside} has chosen how its models are executed; {remedy}")
        if plan.subject.kind == "seq2seq-lm":
            raise TransformError(
                "an encoder with a decoder runs by its own forward, and no compiled engine knows it yet; leave out compile"
            )
        cache = next((step.settings for step in plan.subject.history if step.name == "kv_cache"), None)
        if cache is not None:
            refuse_compiled_cache(plan.subject.module, self.backend, cache)
        if any(step.name == "static_cache" for step in plan.subject.history):
            raise TransformError("compiled steps write into room that is taken beforehand already; leave out static_cache")
        if any(step.name == "sliding_window" for step in plan.subject.history):
            refuse_compiled_window(plan.subject.module, self.backend)
        reason = refusal(plan.subject.module) if self.backend == "native" else None
        if reason is not None:
            raise TransformError(f"the native step cannot run this model: {reason}; use backend: inductor")

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
