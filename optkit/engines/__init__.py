"""How a subject executes, chosen by what the subject is."""

from __future__ import annotations

from optkit.core.subject import Subject
from optkit.engines.contract import Engine, ForwardEngine
from optkit.engines.eager import EagerEngine, EagerForward


def engine_for(subject: Subject) -> Engine | ForwardEngine:
    """Return an engine that can execute the subject."""
    return EagerEngine(subject.module) if subject.kind == "causal-lm" else EagerForward(subject.module)


__all__ = ["EagerEngine", "EagerForward", "Engine", "ForwardEngine", "engine_for"]
