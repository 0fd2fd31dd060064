"""``optkit check``: everything that can be refused without reading a weight."""

from __future__ import annotations

import sys

from optkit.cli.run import Overrides, Recipe, Trust


def check(recipe: Recipe, overrides: Overrides = None, trust_remote_code: Trust = False) -> None:
    """Check a recipe, its model's shapes and every transform on them, without reading weights."""
    from optkit.harness.checking import check_recipe
    from optkit.recipe.reading import load_recipe

    wanted = load_recipe(recipe, overrides or ())
    check_recipe(wanted, str(recipe), trust_remote_code)
    steps = ", ".join(step.step().name for step in wanted.transforms) or "no transforms"
    sys.stdout.write(f"{recipe}: fine ({steps})\n")
