"""The JSON Schema of a recipe file, for completion and help in editors. What spans several keys, such as order, is left to the reader."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import cleandoc
from typing import Any

from pydantic.json_schema import models_json_schema

import optkit.measure
import optkit.tasks
import optkit.transforms
from optkit.core.registry import Registry
from optkit.core.settings import Settings
from optkit.models.networks import NETWORKS
from optkit.models.shapes import SHAPES, Shape
from optkit.recipe.schema import Plain, Recipe, default_meters

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Return the JSON Schema, draft 2020-12, of a recipe file with every transform, task and meter that is registered."""
    registries: tuple[Registry[Any], ...] = (optkit.transforms.TRANSFORMS, optkit.tasks.TASKS, optkit.measure.METERS, NETWORKS)
    kinds: list[type[Settings]] = [Plain, Shape, *(registry[name] for registry in registries for name in registry)]
    references, shared = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/$defs/{model}")
    definitions = {name: _tidy(schema) for name, schema in shared["$defs"].items()}
    named: dict[Any, Schema] = {kind: reference for (kind, _), reference in references.items()}
    plain = definitions.pop(named[Plain]["$ref"].rpartition("/")[2])
    plain["properties"]["limits"]["additionalProperties"] = False
    properties = {key: _optional(schema) if key != "name" else schema for key, schema in plain["properties"].items()}
    properties |= {key: _optional(schema) | _words(key) for key, schema in _named_parts(named).items()}
    return {
        "$schema": DIALECT,
        "title": "optkit recipe",
        "description": "Transforms for a model, and what is measured before and after.",
        "type": "object",
        "properties": {key: properties[key] for key in [*Recipe.model_fields, "extends"] if key in properties},
        "anyOf": [{"required": ["name"]}, {"required": ["extends"]}],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _named_parts(named: Mapping[Any, Schema]) -> dict[str, Schema]:
    """Return the keys of a recipe whose values are looked up in a registry or a table."""
    meters = optkit.measure.METERS
    return {
        "extends": {"type": "string", "minLength": 1},
        "model": {"anyOf": [*_model_texts(), _only("shape", named[Shape]), *_entries(NETWORKS, named)]},
        "task": {"anyOf": _entries(optkit.tasks.TASKS, named)},
        "transforms": {"type": "array", "items": {"anyOf": _entries(optkit.transforms.TRANSFORMS, named)}},
        "measure": {
            "type": "object",
            "properties": {name: _described(_optional(named[meters[name]]), meters[name]) for name in meters},
            "additionalProperties": False,
            "minProperties": 1,
        },
    }


def _words(key: str) -> Schema:
    if key == "extends":
        return {"description": "a recipe file in the same folder or below; mappings merge by key, everything else replaces"}
    field = Recipe.model_fields[key]
    default = {"measure": {name: {} for name in default_meters()}, "transforms": []}.get(key, field.default)
    return {"description": field.description, "default": default}


def _model_texts() -> list[Schema]:
    return [
        {"const": "reference", "description": "the small model of Python code that comes with optkit"},
        *({"const": f"shape:{name}", "description": "random weights of this size: speed and memory only"} for name in SHAPES),
        {"type": "string", "pattern": f"^(?!shape:|({'|'.join(NETWORKS)})$).+", "description": "a folder, or owner/name of the Hub"},
    ]


def _entries(registry: Registry[Any], named: Mapping[Any, Schema]) -> list[Schema]:
    """Return the forms of an entry: the bare name where no setting is required, and the name with its settings."""
    forms: list[Schema] = []
    for name in registry:
        kind = registry[name]
        if not any(field.is_required() for field in kind.model_fields.values()):
            forms.append(_described({"const": name}, kind))
            forms.append(_described(_only(name, _optional(named[kind])), kind))
        else:
            forms.append(_described(_only(name, named[kind]), kind))
    return forms


def _only(key: str, schema: Schema) -> Schema:
    return {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}


def _optional(schema: Schema) -> Schema:
    """Return the schema that also takes a key without a value."""
    alternatives = schema.get("anyOf", [schema]) if set(schema) <= {"anyOf", "description", "default"} else [schema]
    if {"type": "null"} in alternatives:
        return schema
    outer: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = [{key: value for key, value in one.items() if key not in outer} for one in alternatives]
    return {"anyOf": [*inner, {"type": "null"}], **outer}


def _described(schema: Schema, kind: type[Settings]) -> Schema:
    first_paragraph = cleandoc(kind.__doc__ or "").split("\n\n")[0]
    return {**schema, "description": " ".join(first_paragraph.split())}


def _tidy(schema: Any) -> Any:
    """Return pydantic's schema without the titles it makes up."""
    if isinstance(schema, list):
        return [_tidy(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {key: _tidy(value) for key, value in schema.items() if key not in ("title", "properties")}
    if "properties" in schema:
        tidy["properties"] = {key: _tidy(value) for key, value in schema["properties"].items()}
    return tidy
