"""`--set path=value`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optkit.recipe import Recipe

BASE = "name: a\nthreads: 2\ntransforms:\n  - magnitude\n  - int4: {group_size: 32}\nmeasure:\n  latency: {new_tokens: 32}\n"
Reading = Callable[..., Recipe]


@pytest.mark.parametrize("path", ["transforms[1].int4.group_size", "transforms.1.int4.group_size"])
def test_a_setting_is_replaced_by_either_form_of_path(read: Reading, path: str) -> None:
    recipe: Any = read(BASE, f"{path}=128")
    assert recipe.transforms[1].group_size == 128


def test_values_follow_the_rules_of_the_recipe(read: Reading) -> None:
    recipe: Any = read(BASE, "limits={tpot_ms: 5e-1}", "description=no", "threads=", "measure.latency.batch_sizes=[1, 8]", "seed=3")
    assert (recipe.limits, recipe.description, recipe.threads, recipe.seed) == ({"tpot_ms": 0.5}, "no", None, 3)
    assert recipe.measure["latency"].batch_sizes == (1, 8)
    assert recipe.measure["latency"].new_tokens == 32


def test_a_value_may_hold_equals_signs(read: Reading) -> None:
    assert read(BASE, "description=a=b=c").description == "a=b=c"


def test_a_bare_name_takes_settings(read: Reading) -> None:
    recipe: Any = read(BASE, "transforms[0].magnitude.sparsity=0.75", "task=language-modeling", "task.language-modeling.tokens=5000")
    assert recipe.transforms[0].sparsity == 0.75
    assert recipe.task.tokens == 5000


def test_what_is_missing_on_the_way_is_made(read: Reading) -> None:
    recipe: Any = read("name: a\n", "baseline.dtype=float16", "task.language-modeling.window=64", "transforms=[int8]")
    assert (recipe.baseline.dtype, recipe.task.window, len(recipe.transforms)) == ("float16", 64, 1)


def test_one_setting_of_a_default_meter_keeps_the_other_meters(read: Reading) -> None:
    recipe: Any = read("name: a\n", "measure.latency.new_tokens=16")
    assert list(recipe.measure) == ["latency", "memory", "quality"]
    assert recipe.measure["latency"].new_tokens == 16


def test_an_override_repairs_what_the_file_has_wrong(read: Reading) -> None:
    assert read("name: a\nthreads: many\n", "threads=1").threads == 1


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("threads=0", "threads", "must be at least 1, got 0 (--set 'threads=0')"),
        ("colour=red", "colour", "unknown key 'colour'"),
        ("measure.latency.new_token=1", "measure.latency.new_token", "did you mean 'new_tokens'? (--set 'measure.latency.new_token=1')"),
        ("colour.red.dark=1", "colour", "(--set 'colour.red.dark=1')"),
        ("transforms[1].int4.x=1", "transforms[1].int4.x", "unknown key 'x'"),
        ("transforms[1].int8.x=1", "transforms[1]", "got 2 keys ('int4', 'int8')"),
        ("transforms[2]=int8", "transforms", "is a list with positions 0 to 1, there is no '2'"),
        ("transforms.last=int8", "transforms", "there is no 'last'"),
        ("transforms[0].int8.x=1", "transforms[0]", "transforms[0] is 'magnitude', there is nothing named 'int8' in it"),
        ("threads.x=1", "threads", "threads is 2, there is nothing named 'x' in it"),
        ("threads", "", "is not of the form path=value"),
        ("=1", "", "is not of the form path=value"),
        ("a..b=1", "", "is not of the form path=value"),
        ("a[x]=1", "", "is not of the form path=value"),
        (".a=1", "", "is not of the form path=value"),
        (".".join("a" * 40) + "=1", "", "is not of the form path=value"),
        ("threads=*x", "", "alias *x is not allowed"),
        ("threads=!!python/name:os.system", "", "tag"),
        ("threads=[1", "", "no valid YAML"),
        ("threads=\x00", "", "U+0000"),
        ("threads=1e999", "", "too large"),
        ("extends=other.yaml", "extends", "extends cannot be set"),
        ("baseline[0]=1", "baseline", "baseline is nothing, there is nothing named '0' in it"),
    ],
)
def test_a_wrong_override_is_named(problems: Callable[..., list[tuple[int, str, str]]], override: str, path: str, words: str) -> None:
    found = problems(BASE, override)
    assert len(found) == 1, found
    assert words in found[0][2]
    assert found[0][1] == path


def test_wrong_overrides_and_wrong_lines_come_together(problems: Callable[..., list[tuple[int, str, str]]]) -> None:
    found = problems("name: a\nseed: -1\n", "threads=0", "model=zzz", "x")
    assert [line for line, _, _ in found] == [0, 0, 0, 2]
