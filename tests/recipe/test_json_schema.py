"""The JSON Schema agrees with the reader."""

from __future__ import annotations

import json
from typing import Any

import pytest

from optkit.core.errors import ProblemsError
from optkit.recipe import recipe_from_dict, recipe_schema
from optkit.recipe.strict_yaml import parse_text

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.usefixtures("stand_ins")

GOOD = [
    "name: a",
    "{name: a, model: 'shape:gpt2', baseline: {dtype: float16}, threads: 1, seed: 3, description: x}",
    "{name: a, model: owner/name, transforms: [int8, {int4: {group_size: 32}}, {int4: }, {dtype: {dtype: bfloat16}}]}",
    "{name: a, model: {shape: {layers: 1, hidden_size: 8, heads: 2, vocabulary: 10}}, task: language-modeling}",
    "{name: a, task: {language-modeling: {corpus: {files: [a.txt]}, stride: 5}}, measure: {latency: {batch_sizes: [1, 8]}, memory: }}",
    "{name: a, limits: {tpot_ms: 1, tokens_per_second@8: 0.5}, transforms: , measure: , task: , baseline: }",
]
BAD = [
    "{}",
    "{name: ../a}",
    "{name: 5}",
    "{name: a, colour: red}",
    "{name: a, model: shape:none}",
    "{name: a, baseline: {dtype: int8}}",
    "{name: a, threads: 0}",
    "{name: a, transforms: [in8]}",
    "{name: a, transforms: int8}",
    "{name: a, transforms: [dtype]}",
    "{name: a, transforms: [{int4: {group_size: 96}}]}",
    "{name: a, transforms: [{int8: {targets: {exlude: [x]}}}]}",
    "{name: a, transforms: [{int8: {}, int4: {}}]}",
    "{name: a, task: {language-modeling: {corpus: 5}}}",
    "{name: a, measure: {}}",
    "{name: a, measure: [latency]}",
    "{name: a, measure: {latency: {new_tokens: sixteen}}}",
    "{name: a, limits: {tpot_ms: 0}}",
    "{name: a, limits: {'../x': 1}}",
]


@pytest.fixture
def schema(stand_ins: Any) -> Any:
    stand_ins._entries.pop("lost_plugin")
    return recipe_schema()


def is_valid(schema: Any, data: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(data))


def test_the_schema_is_one(schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@pytest.mark.parametrize("text", GOOD)
def test_schema_and_reader_accept_the_same(schema: Any, text: str) -> None:
    data = parse_text(text).data
    recipe_from_dict(data)
    assert is_valid(schema, data)


@pytest.mark.parametrize("text", BAD)
def test_schema_and_reader_refuse_the_same(schema: Any, text: str) -> None:
    data = parse_text(text).data
    with pytest.raises(ProblemsError):
        recipe_from_dict(data)
    assert not is_valid(schema, data)


def test_what_the_reader_writes_satisfies_the_schema(schema: Any) -> None:
    for text in GOOD:
        assert is_valid(schema, recipe_from_dict(parse_text(text).data).to_dict())


def test_an_extending_recipe_needs_no_name(schema: Any) -> None:
    assert is_valid(schema, {"extends": "base.yaml"})


def test_settings_carry_their_descriptions_and_defaults(schema: Any) -> None:
    assert schema["$defs"]["Int4"]["properties"]["group_size"] == {
        "default": 64,
        "description": "inputs that share a scale",
        "enum": [32, 64, 128],
        "type": "integer",
    }
    entries = schema["properties"]["transforms"]["anyOf"][0]["items"]["anyOf"]
    assert {"const": "int4", "description": "Stands for quantization with groups."} in entries


def test_every_object_refuses_unknown_keys(schema: Any) -> None:
    def objects(part: Any) -> Any:
        if isinstance(part, dict):
            if part.get("type") == "object":
                yield part
            for value in part.values():
                yield from objects(value)
        elif isinstance(part, list):
            for value in part:
                yield from objects(value)

    found = list(objects(schema))
    assert len(found) > 10
    assert all(
        part.get("additionalProperties") in (False, {"type": "string"}) for part in found
    )  # the latter: names that are the user's own
