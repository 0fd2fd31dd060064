"""The recipe: one frozen, checked object of real transforms, task and meters. It can be written back as plain data; it opens nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

import optkit.measure
import optkit.tasks
import optkit.transforms
from optkit.core.registry import Registry, did_you_mean
from optkit.core.settings import Settings
from optkit.measure.contract import Meter
from optkit.models.networks import NETWORKS, Network
from optkit.models.shapes import SHAPES, Shape
from optkit.recipe.trail import quoted
from optkit.recipe.yaml_writing import to_yaml
from optkit.tasks.contract import Task
from optkit.transforms.contract import Stage, Transform, name_of

DEFAULT_METERS = ("latency", "memory", "quality")
LONGEST_NAME = 64

_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]*"
_METRIC = "[a-z][a-z0-9_]*(@[1-9][0-9]*)?"


def checked_name(name: str) -> str:
    """Return the name of a recipe, which becomes the name of a folder.

    Raises:
        ValueError: it could lead out of a folder, hide itself or trouble a shell.
    """
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} characters, got {len(name)}")
    if not re.fullmatch(_NAME, name) or ".." in name:
        raise ValueError(f"{quoted(name)} is no name: use letters, digits, '-', '_' and '.', not first '.' or '-', and no '..'")
    return name


def checked_model(model: str) -> str:
    """Return where a model comes from: ``reference``, ``shape:NAME``, a folder, or ``owner/name`` of the Hub.

    Raises:
        ValueError: it is none of them; the message names the nearest.
    """
    if not model or not model.isprintable():
        raise ValueError(f"{quoted(model)} is no model; use 'reference', 'shape:NAME', a folder or 'owner/name' of the Hub")
    if model.startswith("shape:"):
        name = model.removeprefix("shape:")
        if name not in SHAPES:
            raise ValueError(f"unknown shape {quoted(name)}{did_you_mean(name[:LONGEST_NAME], SHAPES)}")
    elif model != "reference" and not any(mark in model for mark in "/\\~") and model not in (".", "..") and not _is_folder(model):
        known = ["reference", *(f"shape:{name}" for name in SHAPES)]
        near = f"; did you mean 'shape:{model}'?" if model in SHAPES else did_you_mean(model[:LONGEST_NAME], known)
        forms = "; use 'reference', 'shape:NAME', './folder' or 'owner/name' of the Hub"
        raise ValueError(f"unknown model {quoted(model)}{near if near.startswith('; did') else forms}")
    return model


def checked_metric(name: str) -> str:
    """Return the name of a metric, with its batch size where that is not 1, such as ``tokens_per_second@8``.

    Raises:
        ValueError: it cannot be the name of a metric.
    """
    if len(name) > LONGEST_NAME or not re.fullmatch(_METRIC, name):
        raise ValueError(f"{quoted(name)} is no name of a metric; it looks like 'tpot_ms' or, for a batch of 8, 'tpot_ms@8'")
    return name


def stage_fault(steps: Sequence[Transform]) -> tuple[int, str] | None:
    """Return the position of the first transform that comes too late in the list, and why; None where the order holds."""
    for position, (before, after) in enumerate(pairwise(steps), start=1):
        if after.stage < before.stage:
            order = ", ".join(stage.name.lower() for stage in Stage)
            return position, (
                f"{word_of(optkit.transforms.TRANSFORMS, after)} ({after.stage.name.lower()}) cannot follow "
                f"{word_of(optkit.transforms.TRANSFORMS, before)} ({before.stage.name.lower()}); the order is {order}: move it up"
            )
    return None


class Baseline(Settings):
    """What the transforms are compared with: the same model, untouched, in this type."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="type that the baseline is stored and computed in")


Name = Annotated[
    str,
    AfterValidator(checked_name),
    WithJsonSchema({"type": "string", "pattern": f"^(?!.*[.][.]){_NAME}$", "maxLength": LONGEST_NAME}),
]
MetricName = Annotated[str, AfterValidator(checked_metric), WithJsonSchema({"type": "string", "pattern": f"^{_METRIC}$"})]


class Plain(Settings):
    """The keys of a recipe that name nothing from a registry."""

    name: Name = Field(description="name of the recipe and of its folder of results")
    description: str | None = Field(default=None, max_length=2000, description="what the recipe is for")
    baseline: Baseline | None = Field(default=None, description="the baseline; default: the model as it is stored")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(default=None, description="threads of each process; default: all cores")
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")] = Field(
        default="cpu", description="where the arms compute: cpu, cuda or cuda:N; they are prepared on the CPU"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="start of all random numbers")
    limits: Mapping[MetricName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="largest allowed ratio after/before of metrics; the run fails where one is exceeded"
    )


def default_meters() -> dict[str, Meter]:
    """Return the meters of a recipe that names none."""
    return {name: optkit.measure.METERS[name]() for name in DEFAULT_METERS}


def _is_folder(model: str) -> bool:
    try:
        return Path(model).is_dir()
    except OSError:
        return False


def in_order(steps: tuple[Transform, ...]) -> tuple[Transform, ...]:
    """Return the transforms.

    Raises:
        ValueError: their stages are out of order.
    """
    fault = stage_fault(steps)
    if fault:
        raise ValueError(fault[1])
    return steps


Steps = Annotated[tuple[Transform, ...], AfterValidator(in_order)]


class Recipe(Plain):
    """A recipe with all defaults filled in."""

    model: Annotated[str, AfterValidator(checked_model)] | Shape | Network = Field(
        default="reference", description="where the model comes from"
    )
    task: Task | None = Field(default=None, description="what the model is for; default: by the model")
    transforms: Steps = Field(default=(), description="what is done to the model, in this order")
    measure: Annotated[Mapping[str, Meter], Field(min_length=1)] = Field(default_factory=default_meters, description="meters by name")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, all defaults included; ``recipe_from_dict`` makes an equal recipe of it."""
        task = self.task and {word_of(optkit.tasks.TASKS, self.task): self.task.model_dump(mode="json")}
        return {
            "name": self.name,
            "description": self.description,
            "model": _model_as_data(self.model),
            "baseline": self.baseline and self.baseline.model_dump(mode="json"),
            "threads": self.threads,
            "device": self.device,
            "seed": self.seed,
            "task": task,
            "transforms": [{word_of(optkit.transforms.TRANSFORMS, step): step.model_dump(mode="json")} for step in self.transforms],
            "measure": {name: meter.model_dump(mode="json") for name, meter in self.measure.items()},
            "limits": dict(self.limits),
        }

    def to_yaml(self) -> str:
        """Return the recipe as YAML, all defaults included; ``load_recipe`` makes an equal recipe of it."""
        return to_yaml(self.to_dict())

    def sha256(self) -> str:
        """Return the digest of the recipe with all defaults: equal for equal recipes, however they were written."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _model_as_data(model: str | Shape | Network) -> Any:
    if isinstance(model, str):
        return model
    return {"shape" if isinstance(model, Shape) else word_of(NETWORKS, model): model.model_dump(mode="json")}


def word_of(registry: Registry[Any], settings: Settings) -> str:
    """Return the name under which the class of these settings is registered."""
    guess = name_of(type(settings))
    for name in sorted(registry, key=lambda name: name.replace("-", "_") != guess):
        if registry[name] is type(settings):
            return name
    return guess
