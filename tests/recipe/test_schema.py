"""The recipe object, and its way back to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from optkit.recipe import Baseline, Recipe, recipe_from_dict

FULL = """
name: full
description: "no: 1e5"
model: {shape: {layers: 2, hidden_size: 64, heads: 4, vocabulary: 100}}
baseline: {dtype: float32}
threads: 2
seed: 7
task: {language-modeling: {corpus: {hub: a/b, split: '1e5'}}}
transforms:
  - magnitude: {sparsity: 0.25, targets: {include: ['012', '0x1', '~', 'true', '1e5', '.5']}}
  - int4: {group_size: 32}
  - data_parallel
measure: {latency: {batch_sizes: [1, 8]}, quality: {}}
limits: {perplexity: 1.05, tpot_ms@8: 6e-1}
"""


def test_a_recipe_comes_back_from_its_own_dictionary_and_yaml(read: Callable[..., Recipe]) -> None:
    recipe = read(FULL)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert read(recipe.to_yaml()) == recipe
    assert read(recipe.to_yaml()).sha256() == recipe.sha256()


def test_the_dictionary_holds_every_default(read: Callable[..., Recipe]) -> None:
    plain = read("name: a\ntransforms: [int4]\n").to_dict()
    assert plain["transforms"] == [{"int4": {"group_size": 64, "head": False, "targets": {"include": ["*"], "exclude": []}}}]
    assert plain["measure"]["latency"]["new_tokens"] == 64
    assert (plain["model"], plain["seed"], plain["task"], plain["limits"]) == ("reference", 0, None, {})


def test_the_digest_depends_on_the_meaning_and_not_on_the_writing(read: Callable[..., Recipe]) -> None:
    short = read("name: a\ntransforms: [int4]\n")
    long = read("# note\ntransforms:\n  - int4:\n      group_size: 64\nname: 'a'\nmeasure: {latency: {}, memory: {}, quality: {}}\n")
    assert short.sha256() == long.sha256()
    assert short.sha256() != read("name: a\ntransforms: [{int4: {group_size: 32}}]\n").sha256()
    assert len(short.sha256()) == 64


def test_equal_values_are_written_out_twice(read: Callable[..., Recipe]) -> None:
    recipe = read("name: a\ntransforms: [int4, int4]\n")
    assert "&" not in recipe.to_yaml()
    assert read(recipe.to_yaml()) == recipe


def test_a_recipe_can_be_made_from_objects(stand_ins: Any) -> None:
    recipe = Recipe(name="a", baseline=Baseline(dtype="float32"), transforms=(stand_ins["int8"](),))
    assert recipe == recipe_from_dict({"name": "a", "baseline": {"dtype": "float32"}, "transforms": ["int8"]})


@pytest.mark.parametrize("wrong", [{"name": "../a"}, {"model": "shape:no"}, {"seed": "1"}, {"extra": 1}, {"measure": {}}])
def test_a_recipe_from_objects_is_checked_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe(**{"name": "a", **wrong})


def test_objects_out_of_order_are_refused(stand_ins: Any) -> None:
    with pytest.raises(ValidationError, match="cannot follow"):
        Recipe(name="a", transforms=(stand_ins["int8"](), stand_ins["magnitude"]()))


def test_a_recipe_is_frozen(read: Callable[..., Recipe]) -> None:
    recipe = read("name: a\n")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 5
