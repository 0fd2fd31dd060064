"""Everything that can be refused before a weight is read: each transform on the model's shapes, in the order of the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from optkit.core import files
from optkit.core.device import device_of
from optkit.core.errors import DataError, ModelError, OptkitError, Problem, ProblemsError, ResourceError
from optkit.core.registry import did_you_mean
from optkit.core.subject import GENERATING, Kind, Subject
from optkit.harness.workloads import supervised, task_for
from optkit.kernels.native import refuse_unknown_choice
from optkit.measure.latency import Latency, sized
from optkit.measure.scenarios import scenarios_of
from optkit.models.artefact import distinct_tensors
from optkit.models.networks import Network
from optkit.models.sources import fresh, outline_model, reference_tokenizer
from optkit.recipe.reading import line_of
from optkit.recipe.schema import Recipe
from optkit.tasks import Task
from optkit.transforms import Dtype, Plan, Stage

_SPARE_BYTES = 64 * 2**20
_ARTEFACTS_BYTES = 12  # a weight: as it is stored, optimized, and as bfloat16 and float32


@dataclass(frozen=True)
class Checked:
    """What the shapes told: the outline of the result, the task it is judged by, and the disk that a run takes at most."""

    outline: Subject
    task: Task
    disk_bytes: int


def check_recipe(recipe: Recipe, name: str, trust_remote_code: bool = False) -> Checked:
    """Run every transform's check on shapes alone, and look at what is measured and limited.

    Args:
        recipe: what to check.
        name: the recipe's file, for messages; its lines are named where it is one.
        trust_remote_code: as given on the command line.

    Raises:
        ProblemsError: every transform that cannot work, with the layer, the number and the fix; those after it are judged
            without its result. Every limit on a metric that this recipe does not measure.
    """
    refuse_unknown_choice()
    try:
        outline = outline_of(recipe, trust_remote_code)
    except ModelError as error:
        raise ProblemsError(name, [Problem(line_of(name, ("model",)), "model", str(error))]) from None
    task = task_for(recipe, outline.kind)
    weights = sum(tensor.numel() for tensor in distinct_tensors(outline.module).values())
    problems = [*_device(recipe, name), *_positions(recipe, name, outline), *_data(task, name), *_metrics(recipe, name, task, outline.kind)]
    latency = recipe.measure.get("latency")
    sizes = latency.batch_sizes if isinstance(latency, Latency) else (1,)
    for position, step in enumerate(recipe.transforms):
        try:
            with torch.device("meta"):
                step.check(Plan(outline, tuple(sizes), recipe.threads or torch.get_num_threads()))
                outline = step.preview(outline)
        except OptkitError as error:
            problems.append(Problem(line_of(name, ("transforms", position)), f"transforms[{position}].{step.step().name}", str(error)))
    shared = sorted({step.processes for step in recipe.transforms if step.processes > 1})
    if len(shared) > 1:
        message = f"trainings of one recipe share their processes, and these ask for {shared} ranks; use the same number"
        problems.append(Problem(line_of(name, ("transforms",)), "transforms", message))
    if outline.mesh.size > 1 and recipe.device != "cpu":
        message = f"{outline.mesh.size} processes of one arm meet on the CPU alone so far; set device to cpu, or leave their step out"
        problems.append(Problem(line_of(name, ("device",)), "device", message))
    problems += _scenarios(recipe, name, outline)
    if problems:
        raise ProblemsError(name, problems)
    return Checked(outline, task, weights * _ARTEFACTS_BYTES + _SPARE_BYTES)


def check_metrics(recipe: Recipe, name: str, task: Task, kind: Kind) -> None:
    """Look at what a recipe measures and limits.

    Raises:
        ProblemsError: every limit on a metric that is not measured, or that has no ratio to the baseline.
    """
    problems = list(_metrics(recipe, name, task, kind))
    if problems:
        raise ProblemsError(name, problems)


def refuse_small_disk(need_bytes: int, folder: Path) -> None:
    """Refuse a run whose artefacts would not fit on the disk.

    Raises:
        ResourceError: with the bytes needed and the bytes free.
        PlaceError: the folder cannot be.
    """
    with files.refusals(folder):
        existing = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        free = shutil.disk_usage(existing).free
    if need_bytes > free:
        raise ResourceError(
            f"the run needs about {need_bytes / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free; choose another folder with --out"
        )


def outline_of(recipe: Recipe, trust_remote_code: bool) -> Subject:
    """Return the recipe's baseline, shapes alone.

    Raises:
        ModelError: there is no such model.
    """
    if isinstance(recipe.model, Network):
        with torch.device("meta"):
            outline = fresh(recipe.model, supervised(recipe).needs(reference_tokenizer()))
    else:
        outline = outline_model(recipe.model, trust_remote_code)
    if recipe.baseline is None:
        return outline
    return replace(outline, module=Dtype(dtype=recipe.baseline.dtype).apply(outline.module))


def _device(recipe: Recipe, name: str) -> Iterator[Problem]:
    try:
        device_of(recipe.device)
    except ResourceError as error:
        yield Problem(line_of(name, ("device",)), "device", str(error))


def _data(task: Task, name: str) -> Iterator[Problem]:
    try:
        task.look()
    except DataError as error:
        yield Problem(line_of(name, ("task",)), "task", str(error))


def _metrics(recipe: Recipe, name: str, task: Task, kind: Kind) -> Iterator[Problem]:
    if "memory" in recipe.measure and "latency" not in recipe.measure:
        message = "needs latency beside it: it is the peak while requests are served"
        yield Problem(line_of(name, ("measure", "memory")), "measure.memory", message)
    known = _compared(recipe, task, kind)
    for metric in recipe.limits:
        if metric not in known:
            message = f"{metric!r} is not compared with the baseline by this recipe{did_you_mean(metric, known)}"
            yield Problem(line_of(name, ("limits", metric)), f"limits.{metric}", message)


def _scenarios(recipe: Recipe, name: str, outline: Subject) -> Iterator[Problem]:
    for meter in scenarios_of(recipe.measure):
        if outline.kind != "causal-lm" or outline.mesh.size > 1:
            message = "serves requests that one causal language model goes on with, in one process"
            yield Problem(line_of(name, ("measure", meter)), f"measure.{meter}", message)


def _compared(recipe: Recipe, task: Task, kind: Kind) -> list[str]:
    """Return the names of all metrics for which a report has the ratio to the baseline."""
    names = ["artefact_bytes", "weight_bytes_per_token"]
    latency = recipe.measure.get("latency")
    if isinstance(latency, Latency):
        names += [metric.name for size in latency.batch_sizes for metric in latency.metrics(size, kind in GENERATING)]
        names += [sized("cache_bytes", size) for size in latency.batch_sizes if kind in GENERATING and not latency.mix]
    if "memory" in recipe.measure:
        names.append("peak_memory_bytes")
        if any(step.stage is Stage.PARALLEL for step in recipe.transforms):
            names.append("peak_rank_memory_bytes")
    names += [metric for meter in scenarios_of(recipe.measure).values() for metric in meter.units()]
    if "quality" in recipe.measure:
        names += [metric.name for metric in task.metrics() if not metric.relative]
    return names


def _positions(recipe: Recipe, name: str, outline: Subject) -> Iterator[Problem]:
    latency = recipe.measure.get("latency")
    most = getattr(getattr(outline.module, "config", None), "max_position_embeddings", None)
    if not isinstance(latency, Latency):
        return
    wanted = latency.positions if outline.kind == "causal-lm" else latency.new_tokens
    if latency.mix and outline.kind != "causal-lm":
        message = "a mix is of prompts of several lengths, and this model takes none; leave it out"
        yield Problem(line_of(name, ("measure", "latency")), "measure.latency.mix", message)
    if isinstance(most, int) and outline.kind in GENERATING and wanted > most:
        message = f"prompts and new_tokens make {wanted} positions together, and the model has {most}"
        yield Problem(line_of(name, ("measure", "latency")), "measure.latency", message)
