"""``optkit run``: apply a recipe, measure before and after, print one table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="recipe file", metavar="RECIPE", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a value of the recipe: path=value; may be repeated", metavar="PATH=VALUE")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="let code that comes with the model run")]


def run_command(
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", help="folder of experiments")] = Path("experiments"),
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON, alone, on standard output")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fewer samples, for a first look")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the latest unfinished run of this recipe")] = False,
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
) -> None:
    """Apply a recipe to its model, measure before and after, and print one table."""
    from optkit.cli.progress import shown
    from optkit.harness.members import expect_workers

    expect_workers()
    from optkit.harness.joining import world
    from optkit.harness.run import lend, run

    place = world()
    if place is not None and place.rank > 0:
        with shown() as progress:
            raise typer.Exit(lend(recipe, tuple(overrides or ()), quick, progress))
    with shown() as progress:
        report = run(
            recipe,
            out=out,
            quick=quick,
            resume=resume,
            overrides=tuple(overrides or ()),
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=shlex.join(["optkit", *sys.argv[1:]]),
        )
    written = out / report.run.name / report.run.id
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        from optkit.report.table import print_table

        print_table(report)
        sys.stdout.write(f"\nwritten to {written}: report.html, report.json, table.md, samples.csv, artefact/\n")
    if not report.held:
        raise typer.Exit(1)
