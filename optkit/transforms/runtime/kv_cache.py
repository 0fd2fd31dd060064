"""Keys and values of past positions kept in 8 or 4 bits. Long texts and large batches take less memory; attention itself is no faster.

Sources: KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079). Of both only what a stream of single tokens allows is taken: scales
for each position, head and group of channels. The numbers are in ``optkit.kernels.kv``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.engines import OWN_FORWARD
from optkit.engines.kv_cache import refusal
from optkit.engines.native import refuse_compiled_cache
from optkit.transforms.contract import Plan, Stage, Transform


class KvCache(Transform):
    """Generate from a cache of packed keys and values, and be judged by it. Saved weights stay as they are: a plain loader ignores it."""

    stage: ClassVar[Stage] = Stage.RUNTIME
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = (
        "kv_cache chooses the cache of a subject, and a bare module has none; generate with optkit.engines.KvCacheEngine"
    )
    bits: Literal[8, 4] = Field(default=8, description="bits of a number")
    group_size: Annotated[int, Field(ge=2, le=65_536)] | None = Field(
        default=None, description="channels that share a scale; default: all of a head"
    )
    keep_recent: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="most recent positions that are kept in full precision"
    )

    def check(self, plan: Plan) -> None:
        """Refuse models whose past is not keys and values, groups that do not divide a head, a second cache, and graphs."""
        history = {step.name: step.settings for step in plan.subject.history}
        if plan.subject.kind != "causal-lm":
            raise TransformError("kv_cache packs what causal language models keep of their past, and this is none; leave it out")
        if self.step().name in history:
            raise TransformError("the cache is quantized already; name kv_cache once")
        beside = sorted(history.keys() & OWN_FORWARD)
        if beside:
            raise TransformError(f"{beside[0]} has an engine of its own, which kv_cache does not reach; leave out one of them")
        reason = refusal(plan.subject.module, self.bits, self.group_size)
        if reason is not None:
            raise TransformError(reason)
        if "compile" in history:
            refuse_compiled_cache(plan.subject.module, history["compile"]["backend"], self.model_dump())

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is."""
        return module
