"""The plan of a recipe as JSON and as a table: what each step will hold, read and take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from optkit.report.metrics import number
from optkit.report.table import markdown_table

SCHEMA = 1
_HEADERS = ("step", "law", "stored MB", "read a token MB", "cache MB", "serving MB", "transforming MB", "TTFT ms", "TPOT ms", "TPOT ratio")


@dataclass(frozen=True)
class PlannedStep:
    """The model after one step. Times are None where no law is known for its kind; ``regime`` is what takes longest of a later token."""

    name: str
    kind: str | None
    stored_bytes: int
    token_bytes: int
    cache_bytes: int
    serving_bytes: int
    transforming_bytes: int
    ttft_ms: float | None
    tpot_ms: float | None
    regime: str | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanReport:
    """All steps of a recipe, the first being the baseline, for requests of its first batch size."""

    recipe: str
    threads: int
    batch_size: int
    steps: tuple[PlannedStep, ...]
    notes: tuple[str, ...]

    def ratio(self, metric: str) -> float | None:
        """Return after/before of ``ttft_ms`` or ``tpot_ms`` as predicted, or None."""
        first, last = getattr(self.steps[0], metric), getattr(self.steps[-1], metric)
        return last / first if first and last else None

    def to_json(self) -> str:
        """Return the plan as JSON."""
        ratios = {metric: self.ratio(metric) for metric in ("ttft_ms", "tpot_ms")}
        return json.dumps({"schema": SCHEMA, **asdict(self), "ratios": ratios}, indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the plan as a table, with its warnings."""
        lines = [
            f"# Plan of {self.recipe}",
            "",
            f"- batch {self.batch_size}, threads {self.threads}; predicted from shapes, nothing is read",
            "",
        ]
        lines += markdown_table(_HEADERS, [self._row(step) for step in self.steps], text_columns=2)
        told = [f"- {step.name}: {warning}" for step in self.steps for warning in step.warnings]
        told += [f"- {note}" for note in self.notes]
        return "\n".join([*lines, *([""] if told else []), *told]) + "\n"

    def _row(self, step: PlannedStep) -> Sequence[str]:
        first = self.steps[0].tpot_ms
        sizes = (step.stored_bytes, step.token_bytes, step.cache_bytes, step.serving_bytes, step.transforming_bytes)
        times = ("-" if value is None else number(value) for value in (step.ttft_ms, step.tpot_ms))
        ratio = "-" if step.tpot_ms is None or not first else f"{step.tpot_ms / first:.2f}"
        return step.name, step.kind or "none", *(number(size / 1e6) for size in sizes), *times, ratio
