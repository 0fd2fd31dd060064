"""Recipes from Python."""

from __future__ import annotations

from typing import Any

import pytest

from optkit.core.errors import ProblemsError
from optkit.recipe import recipe_from_dict


def test_lists_and_tuples_are_the_same(stand_ins: Any) -> None:
    one: dict[str, Any] = {"name": "a", "transforms": ({"int8": {}}, "int4"), "measure": {"latency": {"batch_sizes": (1, 8)}}}
    other = {"name": "a", "transforms": ["int8", {"int4": None}], "measure": {"latency": {"batch_sizes": [1, 8]}}}
    assert recipe_from_dict(one) == recipe_from_dict(other)


def test_the_given_data_is_left_alone(stand_ins: Any) -> None:
    data = {"name": "a", "transforms": ["int8"], "threads": None}
    recipe_from_dict(data)
    assert data == {"name": "a", "transforms": ["int8"], "threads": None}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "expected a mapping"),
        ({"name": "a", "seed": float("nan")}, "expected a number, got nan"),
        ({"name": "a", "seed": 10**18}, "at most 18 digits"),
        ({"name": "a", "description": "\x1b[31m"}, "U+001B"),
        ({"name": "a", "description": "\ud800"}, "U+D800"),
        ({"name": "a", "threads": object()}, "got a Python object"),
        ({"name": "a", "threads": {1}}, "got a Python set"),
        ({"name": "a", 5: 1}, "a key must be text, got 5"),
        ({"name": "a", "": 1}, "a key must be text, got ''"),
        ({"name": "a", "\x00": 1}, "a key must be text"),
        ({"name": "a", "extends": "b.yaml"}, "works in recipe files only"),
        ({"name": "a", "threads": 0}, "must be at least 1, got 0"),
        ({}, "is missing"),
    ],
)
def test_what_no_file_could_hold_is_refused(data: Any, words: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        recipe_from_dict(data)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_circles_and_growing_data_are_refused_quickly() -> None:
    circle: dict[str, Any] = {"name": "a"}
    circle["limits"] = circle
    with pytest.raises(ProblemsError, match="values or 32 levels"):
        recipe_from_dict(circle)
    bomb: list[Any] = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    with pytest.raises(ProblemsError, match="values or 32 levels"):
        recipe_from_dict({"name": "a", "transforms": bomb})
