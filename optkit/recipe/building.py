"""Plain data to a Recipe: every name looked up, every setting checked, all faults collected. It knows nothing of files and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

import optkit.measure
import optkit.tasks
import optkit.transforms
from optkit.core.registry import Registry, did_you_mean
from optkit.core.settings import Settings
from optkit.measure.contract import Meter
from optkit.models.networks import NETWORKS, Network
from optkit.models.shapes import Shape
from optkit.recipe.schema import Plain, Recipe, checked_model, default_meters, stage_fault
from optkit.recipe.trail import LONGEST_SHOWN, Fault, Trail, quoted, shown
from optkit.recipe.words import MOST_FAULTS, faults_of, settings_of
from optkit.tasks.contract import Task
from optkit.transforms.contract import Transform

Kind = TypeVar("Kind", bound=Settings)


def build_recipe(data: Mapping[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """Return the recipe, or None with everything that is wrong. A key without a value counts as not written."""
    written = {key: value for key, value in data.items() if value is not None}
    plain, faults = settings_of(Plain, {key: value for key, value in written.items() if key in Plain.model_fields}, ())
    faults += _unknown_keys(data)
    parts: dict[str, Any] = {}
    for key, build in {"model": _model, "task": _task, "transforms": _transforms, "measure": _measure}.items():
        if key in written:
            parts[key], found = build(written[key])
            faults += found
    if plain is None or faults:
        return None, faults
    try:
        return Recipe(**{key: getattr(plain, key) for key in Plain.model_fields}, **parts), []
    except ValidationError as error:
        return None, faults_of(error, Recipe, written)


def _unknown_keys(data: Mapping[str, Any]) -> list[Fault]:
    """Refuse what is no key of a recipe; ``extends`` is resolved where files are read and cannot come this far."""
    known = [*Recipe.model_fields, "extends"]
    unknown = [key for key in data if key not in Recipe.model_fields][:MOST_FAULTS]
    return [
        Fault((key,), "works in recipe files only" if key == "extends" else f"unknown key {quoted(key)}{did_you_mean(key, known)}")
        for key in unknown
    ]


def _model(value: Any) -> tuple[str | Shape | Network | None, list[Fault]]:
    name = value if isinstance(value, str) else next(iter(value)) if isinstance(value, dict) and len(value) == 1 else None
    if name in NETWORKS:
        return _named(NETWORKS, value, ("model",))
    if isinstance(value, str):
        try:
            return checked_model(value), []
        except ValueError as error:
            return None, [Fault(("model",), str(error))]
    if isinstance(value, dict) and set(value) == {"shape"} and isinstance(value["shape"], dict):
        return settings_of(Shape, value["shape"], ("model", "shape"))
    form = f"text, {{shape: {{layers: ..., hidden_size: ..., heads: ..., vocabulary: ...}}}} or a network: {', '.join(NETWORKS)}"
    got = f"the keys {', '.join(map(quoted, list(value)[:4]))}" if isinstance(value, dict) and value else shown(value)
    if isinstance(value, dict) and set(value) == {"shape"}:
        return None, [Fault(("model", "shape"), f"expected a mapping of numbers, got {shown(value['shape'])}; a named one is 'shape:NAME'")]
    return None, [Fault(("model",), f"expected {form}, got {got}")]


def _task(value: Any) -> tuple[Task | None, list[Fault]]:
    return _named(optkit.tasks.TASKS, value, ("task",))


def _transforms(value: Any) -> tuple[tuple[Transform, ...], list[Fault]]:
    if not isinstance(value, list):
        return (), [Fault(("transforms",), f"expected a list, each entry with '-' in front, got {shown(value)}")]
    steps: dict[int, Transform] = {}
    faults: list[Fault] = []
    for position, entry in enumerate(value):
        step, found = _named(optkit.transforms.TRANSFORMS, entry, ("transforms", position))
        faults += found
        if step is not None:
            steps[position] = step
        if len(faults) >= MOST_FAULTS:
            break
    late = stage_fault(list(steps.values()))
    if late:
        faults.append(Fault(("transforms", list(steps)[late[0]]), late[1]))
    return tuple(steps.values()), faults


def _measure(value: Any) -> tuple[Mapping[str, Meter], list[Fault]]:
    if not isinstance(value, dict):
        return {}, [Fault(("measure",), f"expected a mapping such as 'latency: {{}}', got {shown(value)}")]
    if not value:
        return {}, [Fault(("measure",), f"names no meter; leave it out for {', '.join(default_meters())}")]
    meters: dict[str, Meter] = {}
    faults: list[Fault] = []
    for name, settings in value.items():
        meter, found = _registered(optkit.measure.METERS, name, settings, ("measure", name), ("measure", name))
        faults += found
        if meter is not None:
            meters[name] = meter
        if len(faults) >= MOST_FAULTS:
            break
    return meters, faults


def _named(registry: Registry[Kind], value: Any, trail: Trail) -> tuple[Kind | None, list[Fault]]:
    """Build one thing from its bare name or from ``{name: {settings}}``."""
    if isinstance(value, str):
        return _registered(registry, value, None, trail, trail)
    if not isinstance(value, dict) or not value:
        return None, [Fault(trail, f"expected the name of a {registry.kind} or {{name: {{settings}}}}, got {shown(value)}")]
    if len(value) > 1:
        names = ", ".join(map(quoted, list(value)[:4]))
        advice = "indent settings below the name" if any(key in registry for key in value) else "name one"
        return None, [Fault(trail, f"expected one {registry.kind} an entry, got {len(value)} keys ({names}); {advice}")]
    ((name, settings),) = value.items()
    return _registered(registry, name, settings, trail, (*trail, name))


def _registered(registry: Registry[Kind], name: str, settings: Any, trail: Trail, inside: Trail) -> tuple[Kind | None, list[Fault]]:
    if name not in registry:
        return None, [Fault(trail, registry.unknown(name[:LONGEST_SHOWN]))]
    if settings is not None and not isinstance(settings, dict):
        return None, [Fault(inside, f"expected a mapping of settings, got {shown(settings)}")]
    try:
        kind = registry[name]
    except ImportError as error:
        return None, [Fault(trail, f"{registry.kind} {name!r} cannot be loaded: {error}; install what it needs")]
    return settings_of(kind, settings or {}, inside)
