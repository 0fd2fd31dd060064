"""Recipes: read from YAML, checked as a whole, frozen. Reading one runs nothing and opens no model."""

from __future__ import annotations

from optkit.recipe.json_schema import recipe_schema
from optkit.recipe.reading import load_recipe, recipe_from_dict
from optkit.recipe.schema import Baseline, Recipe

__all__ = ["Baseline", "Recipe", "load_recipe", "recipe_from_dict", "recipe_schema"]
