"""``optkit plan``: what a recipe will cost on this machine, before anything is loaded; and, afterwards, how true that was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.run import Overrides, Trust


def plan_command(
    recipes: Annotated[list[Path], typer.Argument(help="recipe files", metavar="RECIPE...", show_default=False)],
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
    observed: Annotated[Path | None, typer.Option(help="folder of experiments: set the plans beside the last runs there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict bytes, memory and times of every step of a recipe from shapes and the laws that ``optkit law`` has fitted here."""
    from optkit.harness.hindsight import set_beside
    from optkit.harness.planning import plan

    plans = [plan(recipe, tuple(overrides or ()), trust_remote_code) for recipe in recipes]
    found = plans if observed is None else [set_beside(plans, observed)]
    for one in found:
        sys.stdout.write(one.to_json() if as_json else one.to_markdown())
