"""All meters. A new one is one file and one line in ``METERS``."""

from __future__ import annotations

from optkit.core.registry import Registry
from optkit.measure.contract import Meter

METERS: Registry[Meter] = Registry(
    "meter",
    {
        "latency": "optkit.measure.latency:Latency",
        "memory": "optkit.measure.memory:Memory",
        "quality": "optkit.measure.quality:Quality",
        "assistant": "optkit.measure.scenarios:Assistant",
        "documents": "optkit.measure.scenarios:Documents",
    },
)

__all__ = ["METERS", "Meter"]
