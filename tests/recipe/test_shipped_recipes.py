"""The recipes of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.models.shapes import SHAPES
from optkit.recipe import load_recipe, recipe_from_dict, recipe_schema
from optkit.recipe.strict_yaml import parse_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_shipped_recipe_is_right_short_and_named_like_its_file(path: Path) -> None:
    recipe = load_recipe(path)
    lines = path.read_text().splitlines()
    assert recipe.name == path.stem
    assert len(lines) <= 25
    assert lines[0].startswith("# ")
    assert lines[0].endswith((".", "?"))
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_shipped_recipe_satisfies_the_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(recipe_schema()).validate(parse_recipe(path.read_bytes()).data)


def test_the_recipes_of_the_readme_are_there() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names >= {"baseline", "bf16", "int8", "int4", "magnitude50", "drop_layers", "data_parallel2", "shorter-int4"}


def test_recipes_at_scale_need_no_download() -> None:
    models = [load_recipe(path).model for path in (FOLDER / "scale").glob("*.yaml")]
    assert len(models) >= 6
    assert set(models) <= {f"shape:{name}" for name in SHAPES}
