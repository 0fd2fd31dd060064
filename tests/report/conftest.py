"""Synthetic reports for the tests: numbers made from a seed, nothing measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optkit.core.files import seal, write_text
from optkit.report.record import REPORT_FILE, Arm, Compared, Data, Limit, Metric, Model, Report, Run, StepRecord

HOSTILE = "<script>alert(1)</script> | [link](javascript:x) `$\\frac$` \x1b[31mred [bold]&amp;\u202e"
RECIPE = "name: int4\nmodel: reference\ntransforms:\n  - int4: {group_size: 64}\n"
MACHINE: dict[str, Any] = {
    "cpu": "Imaginary 9000",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 8 * 2**30,
    "device": "cpu",
    "gpus": [],
    "system": "Linux",
    "python": "3.12.1",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
}
UNITS = {
    "ttft_ms": "ms",
    "tpot_ms": "ms",
    "tpot_ms@8": "ms",
    "itl_p50_ms": "ms",
    "tokens_per_second": "tokens/s",
    "perplexity": "perplexity",
    "kl_divergence": "nats",
    "peak_memory_bytes": "bytes",
    "artefact_bytes": "bytes",
    "roof_share": "share",
}
VALUES = {
    "ttft_ms": 180.0,
    "tpot_ms": 20.0,
    "tpot_ms@8": 34.0,
    "itl_p50_ms": 19.5,
    "tokens_per_second": 50.0,
    "perplexity": 3.2,
    "kl_divergence": 0.0123,
    "peak_memory_bytes": 6.1e8,
    "artefact_bytes": 5.7e7,
    "roof_share": 0.61,
}
RATIOS = {"perplexity": 1.0031, "artefact_bytes": 0.155, "peak_memory_bytes": 0.7, "tokens_per_second": 1.92, "roof_share": 0.6}


MakeReport = Callable[..., Report]
Finish = Callable[[Path, Report], Path]


@pytest.fixture
def make_report() -> MakeReport:
    """Return the builder of synthetic reports."""
    return report


@pytest.fixture
def finish() -> Finish:
    """Return the function that writes a report as a sealed run."""
    return finished


@pytest.fixture
def hostile() -> str:
    """Return a name that tries markup, script, a link, formulas, terminal escapes and a change of direction."""
    return HOSTILE


@pytest.fixture
def recipe_text() -> str:
    """Return the text of a recipe."""
    return RECIPE


def arm(label: str, factor: float, *, seed: int = 0, count: int = 20, steps: tuple[str, ...] = (), **changes: Any) -> Arm:
    """Return an arm whose times are ``factor`` times those of ``VALUES``."""
    draw = random.Random(seed)
    metrics = {}
    for metric, value in VALUES.items():
        timed = UNITS[metric] == "ms"
        middle = value * (factor if timed else RATIOS.get(metric, 1.0) if steps else 1.0)
        samples = [middle * draw.lognormvariate(0, 0.05) for _ in range(count)] if timed else [middle]
        higher = metric in ("tokens_per_second", "roof_share")
        metrics[metric] = Metric(value=middle, unit=UNITS[metric], samples=tuple(samples), higher_is_better=higher)
    execution = changes.pop("execution", "real")
    history = tuple(StepRecord(name=name, settings={}, execution=execution, opens_in="optkit") for name in steps)
    given = {"history": history, "execution": execution, "opens_in": "optkit", "dtype": "float32", "metrics": metrics}
    return Arm(label=label, **{**given, **changes})


def compared(name: str, before: Arm, after: Arm, verdict: str = "better") -> list[Compared]:
    """Return the comparisons of two arms, with an interval of two percent around each timed ratio."""
    entries = []
    for metric, entry in after.metrics.items():
        old, new = before.metrics[metric].value, entry.value
        ratio = None if not old or new is None else new / old
        wide = 0.02 if UNITS[metric] == "ms" else 0.0
        low, high = (None, None) if ratio is None else (ratio * (1 - wide), ratio * (1 + wide))
        entries.append(Compared(arm=name, metric=metric, before=old, after=new, ratio=ratio, low=low, high=high, verdict=verdict))
    return entries


def report(
    *,
    name: str = "int4",
    run_id: str = "0001",
    factor: float = 0.52,
    perplexity: float = 1.0031,
    steps: tuple[str, ...] = ("int4",),
    execution: str = "real",
    others: tuple[str, ...] = ("bfloat16", "float32"),
    count: int = 20,
    machine: dict[str, Any] | None = None,
    source: str = "reference",
    sha: str = "a" * 64,
    data_sha: str = "d" * 64,
    **changes: Any,
) -> Report:
    """Return a whole report: baseline, optimized arm, other arms, noise, two limits (one broken) and a note."""
    before = arm("the model as stored", 1.0, seed=1, count=count)
    after = arm(f"after {name}", factor, seed=2, count=count, steps=steps, execution=execution)
    worse = after.metrics["perplexity"].model_copy(update={"value": VALUES["perplexity"] * perplexity})
    after = after.model_copy(update={"metrics": {**after.metrics, "perplexity": worse}})
    arms = {"baseline": before, "optimized": after}
    arms |= {other: arm(f"untouched in {other}", 0.8 + 0.1 * place, seed=place, count=count) for place, other in enumerate(others)}
    comparisons = [entry for key, one in arms.items() if key != "baseline" for entry in compared(key, before, one)]
    parts: dict[str, Any] = {
        "run": Run(
            id=run_id,
            name=name,
            started="2026-05-04T13:45:00+00:00",
            seconds=93.5,
            quick=False,
            recipe_sha256="b" * 64,
            stopped_because="the interval is within 2 %",
        ),
        "environment": MACHINE | (machine or {}),
        "model": Model(source=source, parameters=14_000_000, sha256=sha, trained=True),
        "data": Data(task="language-modeling", corpus="python", sha256=data_sha, items=64, description="window 512, stride 512"),
        "arms": arms,
        "comparisons": tuple(comparisons),
        "noise": tuple(compared("baseline-again", before, arm("again", 1.004, seed=3, count=count), "same")),
        "limits": (
            Limit(metric="tpot_ms", limit=0.6, ratio=factor, held=True),
            Limit(metric="perplexity", limit=1.001, ratio=1.0031, held=False),
        ),
        "notes": ("int4 fell back to the reference kernel for lm_head",),
    }
    return Report(**{**parts, **changes})


def finished(root: Path, made: Report) -> Path:
    """Write the report's JSON as a sealed run under ``root`` and return its folder: ``root/<recipe>/<run>``."""
    folder = root / made.run.name / made.run.id
    folder.mkdir(parents=True)
    write_text(folder / REPORT_FILE, made.to_json())
    seal(folder)
    return folder
