"""What a recipe will cost, before a weight is read: bytes, memory and times of every step, from shapes and the laws of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from optkit.core.subject import GENERATING, Subject
from optkit.engines.kv_cache import share_of_bytes
from optkit.engines.native import refusal
from optkit.engines.sliding_window import piece_tokens
from optkit.harness.checking import check_recipe, outline_of
from optkit.harness.machine import KINDS, known_laws
from optkit.harness.workloads import task_for
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.measure.latency import Latency
from optkit.measure.law import Law
from optkit.measure.sweep import load_of
from optkit.measure.traffic import weight_bytes_per_token
from optkit.measure.work import Forward
from optkit.models.artefact import distinct_tensors
from optkit.recipe.reading import load_recipe
from optkit.recipe.schema import Recipe
from optkit.report.plan import PlannedStep, PlanReport
from optkit.transforms import Plan, Transform

_RUNTIME_BYTES = 300 * 2**20  # Python with its libraries, resident
_GAIN = 0.95  # a predicted ratio above this is none
_NO_FASTER = {  # steps that never make one request faster, and what they do instead
    "kv_cache": "packed keys and values save memory, and attention gets floats again",
    "offload": "what does not fit is fetched for each token",
    "ensemble": "a request takes the time of all its models",
    "data_parallel": "whole requests are shared out, and only batches profit",
    "pipeline_parallel": "a request passes all stages one after another, and only batches profit",
}
_NO_FASTER_ON_CPU = {
    "llm_int8": "bitsandbytes has no kernel of its own for it on processors, and quantizes and takes outliers apart in Python",
    "nf4": "the kernels of bitsandbytes for processors save memory, and take longer than products of floats",
}
_OWN_WAYS = {"offload", "ensemble", "draft", "adaptive", "kv_cache", "prompt_lookup", "sparse", "bucketing"}
# Layers by the law that they follow; "": that of the floats around them.
_PACKED: dict[type, str] = {Int8Linear: "int8", W8A8Linear: "int8", Int8Embedding: "", Int4Linear: "int4"}
_POSITIONS = 128  # of an item, where the data decides and has not been read


def plan(recipe: str | Path, overrides: tuple[str, ...] = (), trust_remote_code: bool = False) -> PlanReport:
    """Return the plan of a recipe file.

    Raises:
        OptkitError: the recipe is refused, as ``check`` would.
    """
    wanted = load_recipe(recipe, overrides)
    check_recipe(wanted, str(recipe), trust_remote_code)
    return plan_of(wanted, trust_remote_code)


def plan_of(recipe: Recipe, trust_remote_code: bool = False) -> PlanReport:
    """Return the plan of a recipe that was checked."""
    threads = recipe.threads or torch.get_num_threads()
    laws = known_laws(threads)
    latency = recipe.measure.get("latency")
    meter = latency if isinstance(latency, Latency) else Latency()
    outline = outline_of(recipe, trust_remote_code)
    if outline.kind != "causal-lm":
        meter = meter.model_copy(update={"prompt_tokens": task_for(recipe, outline.kind).item_positions or _POSITIONS})
    steps = [_planned(None, outline, laws, meter, None, recipe.device)]
    for step in recipe.transforms:
        with torch.device("meta"):
            step.check(Plan(outline, tuple(meter.batch_sizes), threads))
            outline = step.preview(outline)
        steps.append(_planned(step, outline, laws, meter, steps[-1], recipe.device))
    missing = sorted({step.kind for step in steps if step.kind is not None and step.kind not in laws})
    told = [f"no law of this machine is known for {kind} with {threads} threads: optkit law --kind {kind}" for kind in missing]
    return PlanReport(recipe.name, threads, meter.batch_sizes[0], tuple(steps), tuple(told))


def kind_of_law(subject: Subject) -> str | None:
    """Return which law a subject follows, or None where there is none."""
    return _lawful(subject)[0]


def _lawful(subject: Subject) -> tuple[str | None, str]:
    """Return which law a subject follows, or None and what there is no law for."""
    if subject.mesh.size > 1:
        return None, f"{subject.mesh.size} processes"
    own = next((step.name for step in subject.history if step.name in _OWN_WAYS), None)
    if own is not None:
        return None, own
    layers = {type(layer) for layer in subject.module.modules() if hasattr(layer, "weight_bytes")}
    strange = next((layer.__name__ for layer in layers if layer not in _PACKED), None)
    if strange is not None:
        return None, f"layers of {strange}"
    if any(isinstance(layer, torch.nn.RNNBase) for layer in subject.module.modules()):
        return None, "recurrent layers"
    kinds = [_PACKED[layer] for layer in layers if _PACKED[layer]]
    dtype = next((tensor.dtype for tensor in subject.module.parameters() if tensor.is_floating_point()), torch.float32)
    # An int8 head beside int4 layers follows the law of these.
    name = min(kinds) if kinds else str(dtype).removeprefix("torch.")
    if name not in KINDS:
        return None, name
    backend = next((step.settings["backend"] for step in subject.history if step.name == "compile"), None)
    if backend is None:
        return name, ""
    if backend != "inductor" and refusal(subject.module) is None:
        return f"{name}-compiled", ""
    return None, "graphs of torch.compile"


def _planned(
    step: Transform | None, outline: Subject, laws: dict[str, Law], meter: Latency, before: PlannedStep | None, device: str
) -> PlannedStep:
    module, batch = outline.module, meter.batch_sizes[0]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(module).values())
    prompt = meter.prompt_tokens
    generates = outline.kind in GENERATING
    kind, unlawful = _lawful(outline)
    in_one_call = kind is not None and kind.endswith("-compiled")
    pieces = _pieces(outline, batch, prompt, meter.shared_tokens, generates)
    first = [load_of(module, piece) for piece in pieces]
    middle, end = (Forward(batch, 1, _kept(outline, prompt + count)) for count in (meter.new_tokens // 2, meter.new_tokens))
    later = load_of(module, middle, in_one_call)
    cache = int(load_of(module, end).cache_bytes * _packed_share(outline, end.past)) if generates else 0
    law = laws.get(kind) if kind else None
    serving = stored + cache + _RUNTIME_BYTES + _activations(module, max(piece.batch * piece.tokens for piece in pieces))
    found = PlannedStep(
        name=step.step().name if step else "baseline",
        kind=kind,
        stored_bytes=stored,
        token_bytes=weight_bytes_per_token(module),
        cache_bytes=cache,
        serving_bytes=serving,
        transforming_bytes=_RUNTIME_BYTES + (stored if before is None else before.stored_bytes + stored),
        ttft_ms=sum(law.seconds(piece) for piece in first) * 1e3 if law else None,
        tpot_ms=law.seconds(later) * 1e3 if law and generates else None,
        regime=law.regime(later if generates else first[0]) if law else None,
        unlawful=unlawful,
        terms=law.terms(later if generates else first[0]) if law else {},
    )
    return replace(found, warnings=tuple(_warnings(step, outline, found, before, law, device)))


def _pieces(subject: Subject, batch: int, prompt: int, shared: int, only_last: bool) -> list[Forward]:
    """Return the forwards that a prompt is read in; what its beginning shares with earlier ones may be known."""
    history = {step.name: step.settings for step in subject.history}
    known = shared if "prefix_cache" in history else 0
    most = history["chunked_prefill"]["tokens"] if "chunked_prefill" in history else prompt
    if "sliding_window" in history:
        most = piece_tokens(history["sliding_window"]["positions"], history["sliding_window"]["sinks"])
    starts = range(known, prompt, min(most, max(1, prompt - known)))
    return [Forward(batch, min(most, prompt - start), _kept(subject, start), only_last) for start in starts]


def _kept(subject: Subject, positions: int) -> int:
    """Return how many of so many positions a cache keeps."""
    window = next((step.settings for step in subject.history if step.name == "sliding_window"), None)
    return positions if window is None else min(positions, window["positions"] + window["sinks"])


def _packed_share(subject: Subject, positions: int) -> float:
    """Return which share of the bytes of plain keys and values a subject holds after so many positions."""
    packing = next((step.settings for step in subject.history if step.name == "kv_cache"), None)
    return 1.0 if packing is None else share_of_bytes(subject.module, positions, **packing)


def _activations(module: torch.nn.Module, rows: int) -> int:
    """Return about what a forward of so many rows holds beside the weights: some copies of its widest layer, in float32."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    linears = (layer for layer in module.modules() if isinstance(layer, torch.nn.Linear) and layer is not head)
    return 4 * rows * 6 * max((layer.out_features for layer in linears), default=1)


def _warnings(
    step: Transform | None, outline: Subject, found: PlannedStep, before: PlannedStep | None, law: Law | None, device: str
) -> list[str]:
    if step is None or before is None:
        return []
    told = []
    each = "token" if outline.kind in GENERATING else "item"
    no_faster = _NO_FASTER | (_NO_FASTER_ON_CPU if device == "cpu" else {})
    if step.step().name in no_faster:
        told.append(f"no gain expected in time per {each}: {no_faster[step.step().name]}")
    if step.step().execution == "simulated":
        told.append("mask only: zeros are stored and multiplied like any other number; no gain in speed or size")
    elif outline.mesh.size > 1:
        told.append(f"served by {outline.mesh.size} processes: not predicted; whether that pays, the run's report says")
    elif law is not None and found.ttft_ms is not None and before.ttft_ms is not None:
        now, earlier = (found.ttft_ms, before.ttft_ms) if found.tpot_ms is None else (found.tpot_ms, before.tpot_ms)
        share = found.terms["overhead"] * 1e3 / now
        if step.step().execution == "real" and earlier is not None and now > _GAIN * earlier:
            why = f"overhead-bound at this size ({share:.0%} of it)" if share > 0.5 else f"{found.regime} takes longest"
            told.append(f"no gain expected in time per {each}: {why}")
        if each == "token" and found.ttft_ms > before.ttft_ms / _GAIN:
            told.append(f"the first token is expected to take {found.ttft_ms / before.ttft_ms - 1:.0%} longer")
    elif found.unlawful != before.unlawful:
        told.append(f"times are not predicted: no law for {found.unlawful}")
    return told
