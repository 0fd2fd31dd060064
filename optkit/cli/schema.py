"""``optkit schema``: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import sys


def schema() -> None:
    """Print the JSON Schema of recipe files, so that editors complete and check them."""
    from optkit.core.files import json_text
    from optkit.recipe.json_schema import recipe_schema

    sys.stdout.write(json_text(recipe_schema()))
