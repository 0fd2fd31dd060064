"""``optkit law``: how response time and throughput of this machine depend on model size, input length and batch size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_MODELS = tuple(f"shape:llama-{size}" for size in ("1m", "5m", "25m", "135m", "260m", "1b"))


def law_command(
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="float32, bfloat16, int8, int4, or one of them -compiled")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="a model as recipes name it; may be repeated")] = None,
    prompts: Annotated[list[int] | None, typer.Option("--prompt", help="tokens of a prompt; may be repeated", min=1)] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="sequences at once; may be repeated", min=1)] = None,
    most_seconds: Annotated[float, typer.Option(help="leave out what takes longer, by what was measured before", min=0.1)] = 5.0,
    passes: Annotated[int, typer.Option(help="measure all models so many times; the median of each point counts", min=1)] = 3,
    threads: Annotated[int | None, typer.Option(help="threads; default: all cores", min=1)] = None,
    out: Annotated[Path, typer.Option("--out", help="folder of experiments")] = Path("experiments"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure T(P, L) and Q(P, L) on this machine and fit a law with physical terms, which ``optkit plan`` predicts by."""
    from optkit.cli.progress import shown
    from optkit.harness.members import expect_workers

    expect_workers()
    from optkit.harness.timing_law import measure_law

    with shown() as progress:
        folder, report = measure_law(
            kinds or ["float32"],
            models or _MODELS,
            prompts or (16, 64, 256, 1024, 2048),
            batches or (1, 4, 16),
            most_seconds,
            threads,
            out,
            passes,
            progress,
        )
    sys.stdout.write(report.to_json() if as_json else report.to_markdown() + f"\nwritten to {folder}: law.json, table.md, pictures\n")
