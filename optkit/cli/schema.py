"""``optkit schema``: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import json
import sys


def schema() -> None:
    """Print the JSON Schema of recipe files, so that editors complete and check them."""
    from optkit.recipe.json_schema import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=1) + "\n")
