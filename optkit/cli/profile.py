"""``optkit profile``: where the time of a model's requests goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.run import Overrides, Trust


def profile_command(
    model_or_recipe: Annotated[str, typer.Argument(help="a recipe file, or a model as recipes name it", metavar="MODEL_OR_RECIPE")],
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="later tokens of each request", min=2)] = 32,
    batch_size: Annotated[int, typer.Option(help="sequences, or items, at once", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="requests that are timed untouched, and as many watched", min=1)] = 12,
    threads: Annotated[int | None, typer.Option(help="threads; default: those of the recipe, or all cores", min=1)] = None,
    out: Annotated[Path, typer.Option("--out", help="folder of experiments")] = Path("experiments"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure the stages of first and later tokens: time, operations, bytes and cycles of each, before and after a recipe's transforms."""
    from optkit.cli.progress import shown
    from optkit.harness.members import expect_workers

    expect_workers()
    from optkit.harness.profiling import profile

    with shown() as progress:
        folder, report = profile(
            model_or_recipe,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            overrides=tuple(overrides or ()),
            out=out,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    sys.stdout.write(report.to_json() if as_json else report.to_markdown() + f"\nwritten to {folder}: profile.json, table.md, stages.svg\n")
