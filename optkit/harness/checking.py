"""Everything that can be refused before a weight is read: each transform on the model's shapes, in the order of the recipe."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from optkit.core.errors import OptkitError, Problem, ProblemsError, ResourceError
from optkit.core.subject import Subject
from optkit.measure.latency import Latency
from optkit.models.artefact import distinct_tensors
from optkit.models.sources import outline_model
from optkit.recipe.reading import line_of
from optkit.recipe.schema import Recipe
from optkit.transforms import Plan

_SPARE_BYTES = 64 * 2**20


def check_recipe(recipe: Recipe, name: str, trust_remote_code: bool = False) -> Subject:
    """Run every transform's check on shapes alone and return the outline of the result.

    Args:
        recipe: what to check.
        name: the recipe's file, for messages; its lines are named where it is one.
        trust_remote_code: as given on the command line.

    Raises:
        ProblemsError: every transform that cannot work, with the layer, the number and the fix; those after it are judged
            without its result.
    """
    outline = outline_model(recipe.model, trust_remote_code)
    latency = recipe.measure.get("latency")
    sizes = latency.batch_sizes if isinstance(latency, Latency) else (1,)
    problems = []
    for position, step in enumerate(recipe.transforms):
        try:
            with torch.device("meta"):
                step.check(Plan(outline, tuple(sizes), recipe.threads or torch.get_num_threads()))
                outline = step.preview(outline)
        except OptkitError as error:
            problems.append(Problem(line_of(name, ("transforms", position)), f"transforms[{position}].{step.step().name}", str(error)))
    if problems:
        raise ProblemsError(name, problems)
    return outline


def refuse_small_disk(outline: Subject, copies: float, folder: Path) -> None:
    """Refuse a run whose artefacts would not fit on the disk.

    Raises:
        ResourceError: with the bytes needed and the bytes free.
    """
    need = int(sum(tensor.numel() * 4 for tensor in distinct_tensors(replace(outline).module).values()) * copies) + _SPARE_BYTES
    existing = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise ResourceError(
            f"the run needs about {need / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free; choose another folder with --out"
        )
