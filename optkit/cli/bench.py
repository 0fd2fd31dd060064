"""``optkit bench``: time parts of optkit by themselves. A bench is no trial: it knows speeds, and nothing of quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(name="bench", help="Time parts of optkit by themselves.", no_args_is_help=True)


@bench.callback()
def _several() -> None:
    """Keep the names of the benches, however few there are."""


@bench.command("kernels")
def kernels(
    tokens: Annotated[list[int] | None, typer.Option(help="tokens at once; may be repeated", min=1)] = None,
    rows: Annotated[int, typer.Option(help="out_features of a layer", min=1)] = 5632,
    cols: Annotated[int, typer.Option(help="in_features of a layer, a multiple of 128", min=128)] = 2048,
    weights: Annotated[int, typer.Option(help="weights in all layers together", min=1)] = 700_000_000,
    threads: Annotated[int | None, typer.Option(help="threads; default: all cores", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="how long to measure each number of tokens", min=0.1)] = 20.0,
    out: Annotated[Path, typer.Option("--out", help="folder of experiments")] = Path("experiments"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time int8 and int4 layers beside PyTorch's own and beside the speed of the memory (default: 1, 4, 16, 128 and 256 tokens)."""
    import torch

    from optkit.cli.progress import shown
    from optkit.core import files
    from optkit.core.environment import environment
    from optkit.core.errors import OptkitError
    from optkit.harness.kernel_bench import Case, bench_kernels
    from optkit.kernels.native import explain
    from optkit.report.bench import to_json, to_markdown

    if cols % 128:
        raise OptkitError(f"--cols {cols} is no multiple of 128, the largest group of int4")
    lines = []
    with shown() as progress:
        for count in tokens or (1, 4, 16, 128, 256):
            lines += bench_kernels(Case(rows, cols, weights, count), seconds, threads, progress=progress)
    facts = {**environment(), "threads": torch.get_num_threads(), "kernels": explain()}
    title = f"Kernels: layers of {rows} x {cols}, {weights / 1e6:.0f} M weights; {explain()}"
    folder = files.new_folder(out / "bench-kernels")
    files.write_text(folder / "bench.json", to_json(lines, {"rows": rows, "cols": cols, "weights": weights}, facts))
    files.write_text(folder / "table.md", to_markdown(lines, title))
    files.seal(folder)
    sys.stdout.write((folder / ("bench.json" if as_json else "table.md")).read_text())
