"""``optkit train``: train the network of a recipe once, and show what it is worth."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from optkit.cli.run import Overrides, Recipe


def train_command(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Train the network of a recipe, unless that was done before, and set it against the trivial answer."""
    from optkit.cli.progress import shown
    from optkit.harness.members import expect_workers

    expect_workers()
    from optkit.harness.lesson import train

    with shown() as progress:
        found = train(recipe, tuple(overrides or ()), progress)
    sys.stdout.write(found.to_json() if as_json else found.to_markdown())
