"""How a subject executes, chosen by what the subject is."""

from __future__ import annotations

from optkit.core.subject import Subject
from optkit.engines.compiled import CompiledEngine, CompiledForward
from optkit.engines.contract import Engine, ForwardEngine
from optkit.engines.eager import EagerEngine, EagerForward
from optkit.engines.native import NativeEngine, refusal


def engine_for(subject: Subject) -> Engine | ForwardEngine:
    """Return an engine that can execute the subject: its own forward, unless its history has a ``compile``."""
    backend = next((step.settings["backend"] for step in subject.history if step.name == "compile"), None)
    if subject.kind != "causal-lm":
        return EagerForward(subject.module) if backend is None else CompiledForward(subject.module)
    if backend is None:
        return EagerEngine(subject.module)
    if backend == "native" or (backend == "auto" and refusal(subject.module) is None):
        return NativeEngine(subject.module)
    return CompiledEngine(subject.module)


def told(engine: Engine | ForwardEngine) -> str | None:
    """Return how the engine executes, for a report; None for the model's own forward."""
    if isinstance(engine, NativeEngine):
        return "steps of one token in one call of optkit's kernels, in float32; prompts by the model's own forward"
    if isinstance(engine, CompiledEngine):
        reason = refusal(engine.module)
        chosen = f" (not by optkit's kernels: {reason})" if reason else ""
        return f"steps of one token as one graph of torch.compile{chosen}; prompts by the model's own forward"
    return "the module as graphs of torch.compile" if isinstance(engine, CompiledForward) else None


__all__ = [
    "CompiledEngine",
    "CompiledForward",
    "EagerEngine",
    "EagerForward",
    "Engine",
    "ForwardEngine",
    "NativeEngine",
    "engine_for",
    "told",
]
