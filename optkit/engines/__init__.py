"""How a subject executes, chosen by what the subject is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Subject
from optkit.engines.adaptive import AdaptiveEngine, Way
from optkit.engines.bucketed import BucketedForward
from optkit.engines.compiled import CompiledEngine, CompiledForward
from optkit.engines.contract import Engine, ForwardEngine
from optkit.engines.drafting import DraftEngine
from optkit.engines.eager import EagerEngine, EagerForward
from optkit.engines.kv_cache import KvCacheEngine
from optkit.engines.native import NativeEngine, refusal
from optkit.engines.offloading import explain, is_offloaded
from optkit.engines.parallel.part import Part
from optkit.engines.pipelined import PipelineEngine
from optkit.engines.reusing import ReusingEngine
from optkit.engines.seq2seq import Seq2SeqEngine
from optkit.engines.sliding_window import SlidingWindowEngine
from optkit.engines.speculative import SpeculativeEngine
from optkit.engines.static_cache import StaticCacheEngine
from optkit.kernels.peers import SharedPeers

OWN_CACHE = frozenset(("draft", "adaptive", "static_cache", "sliding_window"))
"""Transforms whose engine decides alone what is kept of a past."""
OWN_FORWARD = OWN_CACHE | {"prefix_cache", "chunked_prefill", "prompt_lookup"}
"""Those, and transforms whose engine calls the model's own forward in a way of its own."""


def engine_for(subject: Subject, part: Part | None = None) -> Engine | ForwardEngine:
    """Return an engine that can execute the subject: its own forward, unless its history has a ``compile`` or a ``kv_cache``.

    Args:
        subject: what is executed, or one part of it.
        part: which part, where several processes hold it together.

    Raises:
        TransformError: it has both, and the native step cannot run them; or it is a part, and no engine runs it so.
    """
    backend = next((step.settings["backend"] for step in subject.history if step.name == "compile"), None)
    cache = next((step.settings for step in subject.history if step.name == "kv_cache"), None)
    reason = refusal_of_parts(subject, part.mesh) if part is not None else None
    if reason is not None:
        raise TransformError(reason)
    if part is not None and part.mesh.pipeline > 1:
        return PipelineEngine(subject.module, part)
    if subject.kind == "seq2seq-lm":
        if backend is not None:
            raise TransformError(
                "an encoder with a decoder runs by its own forward, and no compiled engine knows it yet; leave out compile"
            )
        return Seq2SeqEngine(subject.module)
    if subject.kind != "causal-lm":
        forward = EagerForward(subject.module) if backend is None else CompiledForward(subject.module)
        bucketing = next((step.settings for step in subject.history if step.name == "bucketing"), None)
        return forward if bucketing is None else BucketedForward(forward, bucketing["multiple"])
    draft = next((step.settings for step in subject.history if step.name == "draft"), None)
    adaptive = next((step.settings for step in subject.history if step.name == "adaptive"), None)
    if adaptive is not None:
        return _adaptive(subject, adaptive)
    if draft is not None:
        model, other = subject.module.members  # type: ignore[misc]
        return DraftEngine(model, NativeEngine(other) if refusal(other) is None else EagerEngine(other), draft["tokens"])
    static = next((step.settings for step in subject.history if step.name == "static_cache"), None)
    sliding = next((step.settings for step in subject.history if step.name == "sliding_window"), None)
    if static is not None:
        return StaticCacheEngine(subject.module, **static)
    if sliding is not None and backend is None:
        return SlidingWindowEngine(subject.module, **sliding)
    reuse = _reuse(subject)
    lookup = next((step.settings for step in subject.history if step.name == "prompt_lookup"), None)
    if lookup is not None:
        return SpeculativeEngine(subject.module, **lookup, **reuse)
    if backend is None and reuse:
        return ReusingEngine(subject.module, **reuse)
    if backend is None:
        return EagerEngine(subject.module) if cache is None else KvCacheEngine(subject.module, **cache)
    if backend == "native" or (backend == "auto" and refusal(subject.module, part=part) is None):
        return NativeEngine(subject.module, cache, part, reuse, sliding)
    if part is not None:
        raise TransformError(f"compiled steps cannot run on shards: {refusal(subject.module, part=part)}; leave out compile")
    if cache is not None:
        raise TransformError("graphs of torch.compile keep their own cache of floats; leave out compile or kv_cache")
    if sliding is not None:
        raise TransformError("graphs of torch.compile keep all positions; leave out compile or sliding_window")
    return CompiledEngine(subject.module)


def _adaptive(subject: Subject, settings: Any) -> AdaptiveEngine:
    """Return the engine of a model and its variants."""
    model, *others = subject.module.members  # type: ignore[misc]
    before = tuple(step for step in subject.history if step.name != "adaptive")
    own, *further = settings["perplexities"]
    ways = {"as it is": Way(engine_for(replace(subject, module=model, history=before)), perplexity=own)}
    for number, (module, way, ratio) in enumerate(zip(others, settings["ways"], further, strict=True), 1):
        engine = NativeEngine(module) if way["compile"] and refusal(module) is None else EagerEngine(module)
        parts = [f"{way['bits']} bits" if way["bits"] else "", way["dtype"] or "", "compiled" if isinstance(engine, NativeEngine) else ""]
        parts += [
            f"without {len(way['drop_layers'])} blocks" if way["drop_layers"] else "",
            f"{way['threads']} threads" if way["threads"] else "",
        ]
        name = " ".join(part for part in parts if part) or "untouched"
        ways[name if name not in ways else f"{name} ({number})"] = Way(engine, way["threads"], ratio)
    sizes = settings["batch_sizes"], settings["prompt_tokens"]
    return AdaptiveEngine(ways, model.config.vocab_size, *sizes, settings["new_tokens"])


def _reuse(subject: Subject) -> dict[str, Any]:
    """Return how prompts are taken: in which pieces, and which beginnings are kept."""
    found: dict[str, Any] = {}
    for step in subject.history:
        if step.name == "chunked_prefill":
            found["chunk"] = step.settings["tokens"]
        elif step.name == "prefix_cache":
            found |= {"entries": step.settings["entries"], "least": step.settings["least"]}
    return found


def refusal_of_parts(subject: Subject, mesh: Mesh) -> str | None:
    """Return why no engine runs the parts of a subject in these roles, or None where one does."""
    names = {step.name for step in subject.history}
    backend = next((step.settings["backend"] for step in subject.history if step.name == "compile"), None)
    if mesh.tensor > 1 and backend is not None:
        reason = "no graph of torch.compile has sums over processes" if backend == "inductor" else refusal(subject.module)
        if reason is not None:
            return f"compiled steps cannot run on shards: {reason}; leave out compile"
    own = sorted(names & OWN_FORWARD)
    if mesh.parts > 1 and own:
        return f"a part of a model takes whole prompts; leave out {' and '.join(own)}"
    if mesh.parts > 1 and "offload" in names:
        return "a part of a model is held in memory whole; leave out offload"
    if mesh.pipeline > 1 and names & {"compile", "kv_cache"}:
        return f"stages run the model's own forward with its own cache; leave out {' and '.join(sorted(names & {'compile', 'kv_cache'}))}"
    return None


def told(engine: Engine | ForwardEngine, part: Part | None = None) -> str | None:
    """Return how the engine executes, for a report, and how parts of a model meet; None for the model's own forward as a whole."""
    ways = [_told(engine)]
    if part is not None and part.peers is not None:
        way = "in shared memory" if isinstance(part.peers, SharedPeers) else "over the network, by gloo"
        ways.append(f"sums over {part.mesh.tensor} shards {way}")
    return "; ".join(way for way in ways if way) or None


def _told(engine: Engine | ForwardEngine) -> str | None:
    if isinstance(engine, PipelineEngine):
        counts = " and ".join(map(str, engine.part.stages)) or "as many"
        return f"stages of {counts} blocks, {engine.part.micro_batches} micro-batches, by the model's own forward"
    if isinstance(engine, NativeEngine):
        kept = f", keys and values in {engine.cache_bits} bits" if engine.cache_bits else ""
        kept += f", {_cut(engine.sliding)}" if engine.sliding else ""
        return f"steps of one token in one call of optkit's kernels, in float32{kept}; prompts by the model's own forward"
    if isinstance(engine, BucketedForward):
        inner = _told(engine.inner) or "the model's own forward"
        return f"{inner}, items by their length rounded up to a multiple of {engine.multiple}"
    if isinstance(engine, AdaptiveEngine):
        return f"the quickest of {len(engine.ways)} ways ({', '.join(engine.ways)}), by a table measured at the first request"
    if isinstance(engine, DraftEngine):
        way = "steps of optkit's kernels" if isinstance(engine.draft, NativeEngine) else "its own forward"
        return f"the model's own forward, up to {engine.tokens} tokens guessed by another model's {way} and checked at once"
    if isinstance(engine, SpeculativeEngine):
        return f"the model's own forward, up to {engine.tokens} tokens guessed from the text and checked at once"
    if isinstance(engine, ReusingEngine):
        pieces = f"prompts in pieces of {engine.chunk} tokens" if engine.chunk else "whole prompts"
        return f"the model's own forward, {pieces}" + (f", beginnings of the last {engine.entries} kept" if engine.entries else "")
    if isinstance(engine, StaticCacheEngine):
        return "the model's own forward, keys and values written into room that is taken beforehand"
    if isinstance(engine, SlidingWindowEngine):
        return f"the model's own forward, {_cut((engine.positions, engine.sinks))}"
    if isinstance(engine, KvCacheEngine):
        recent = f", the {engine.keep_recent} most recent positions as they are" if engine.keep_recent else ""
        return f"the model's own forward, keys and values kept in {engine.bits} bits{recent} and given to attention as floats"
    if isinstance(engine, EagerEngine | EagerForward | Seq2SeqEngine) and is_offloaded(engine.module):
        return f"the model's own forward; {explain(engine.module)}"
    if isinstance(engine, CompiledEngine):
        reason = refusal(engine.module)
        chosen = f" (not by optkit's kernels: {reason})" if reason else ""
        return f"steps of one token as one graph of torch.compile{chosen}; prompts by the model's own forward"
    return "the module as graphs of torch.compile" if isinstance(engine, CompiledForward) else None


def _cut(sliding: tuple[int, int]) -> str:
    positions, sinks = sliding
    return f"keys and values of the last {positions} positions" + (f" and the first {sinks}" if sinks else "")


__all__ = [
    "AdaptiveEngine",
    "BucketedForward",
    "CompiledEngine",
    "CompiledForward",
    "DraftEngine",
    "EagerEngine",
    "EagerForward",
    "Engine",
    "ForwardEngine",
    "KvCacheEngine",
    "NativeEngine",
    "PipelineEngine",
    "ReusingEngine",
    "Seq2SeqEngine",
    "SlidingWindowEngine",
    "SpeculativeEngine",
    "StaticCacheEngine",
    "engine_for",
    "refusal_of_parts",
    "told",
]
