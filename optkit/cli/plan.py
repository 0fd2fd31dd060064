"""``optkit plan``: what a recipe will cost on this machine, before anything is loaded."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from optkit.cli.run import Overrides, Recipe, Trust


def plan_command(
    recipe: Recipe,
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict bytes, memory and times of every step of a recipe from shapes and the laws that ``optkit law`` has fitted here."""
    from optkit.harness.planning import plan

    found = plan(recipe, tuple(overrides or ()), trust_remote_code)
    sys.stdout.write(found.to_json() if as_json else found.to_markdown())
