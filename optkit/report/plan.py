"""The plan of a recipe as JSON and as a table: what each step will hold, read and take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from optkit.core.files import json_text
from optkit.report.metrics import number
from optkit.report.table import markdown_table

SCHEMA = 1
_HEADERS = ("step", "law", "stored MB", "read a token MB", "cache MB", "serving MB", "transforming MB", "TTFT ms", "TPOT ms", "TPOT ratio")


@dataclass(frozen=True)
class PlannedStep:
    """The model after one step. Times are None where no law is known for its kind; ``regime`` is what takes longest of a later token.

    ``unlawful`` says why there is no kind. ``terms`` are the seconds that a later token, or a forward pass, is made of.
    """

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
    unlawful: str = ""
    terms: Mapping[str, float] = field(default_factory=dict)
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
        return json_text({"schema": SCHEMA, **asdict(self), "ratios": ratios})

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


@dataclass(frozen=True)
class Foretold:
    """One metric of one recipe: times and ratio as planned (None where there is no law) and as measured."""

    recipe: str
    metric: str
    planned_before: float | None
    before: float
    planned_after: float | None
    after: float
    ratio: float
    low: float | None
    high: float | None
    why: str

    @property
    def planned_ratio(self) -> float | None:
        """after/before as planned."""
        return self.planned_after / self.planned_before if self.planned_after and self.planned_before else None

    @property
    def off(self) -> float | None:
        """By which share the planned ratio is off; what the interval of the measured one covers is not."""
        if self.planned_ratio is None:
            return None
        if self.low is not None and self.high is not None and self.low <= self.planned_ratio <= self.high:
            return 0.0
        return abs(self.planned_ratio / self.ratio - 1)


@dataclass(frozen=True)
class HindsightReport:
    """Plans beside measurements, of one kind of processor; ``without`` are recipes that have not been run there."""

    cpu: str
    rows: tuple[Foretold, ...]
    without: tuple[str, ...]

    def to_json(self) -> str:
        """Return the table as JSON."""
        rows = [{**asdict(row), "planned_ratio": row.planned_ratio, "off": row.off} for row in self.rows]
        plain = {"schema": SCHEMA, "cpu": self.cpu, "rows": rows, "without": list(self.without)}
        return json_text(plain)

    def to_markdown(self) -> str:
        """Return the table, and how many ratios came within a quarter."""
        headers = ("recipe", "metric", "why, or warned", "before", "planned", "after", "planned", "ratio (95 %)", "planned", "off")
        lines = ["# Plans and measurements", "", f"- measured on {self.cpu}, ms; a plan within the measured interval is not off", ""]
        lines += markdown_table(headers, [_told(row) for row in self.rows], text_columns=3)
        foretold = [row.off for row in self.rows if row.off is not None]
        near = sum(off <= _NEAR for off in foretold)
        lines += ["", f"Within {_NEAR:.0%}: {near} of {len(foretold)} that have a law; {len(self.rows) - len(foretold)} have none."]
        if self.without:
            lines += ["", f"Not run there: {', '.join(self.without)}."]
        return "\n".join(lines) + "\n"


_NEAR = 0.25


def _told(row: Foretold) -> Sequence[str]:
    def shown(value: float | None) -> str:
        return "-" if value is None else number(value)

    ends = f" [{row.low:.2f}, {row.high:.2f}]" if row.low is not None and row.high is not None else ""
    times = (shown(value) for value in (row.before, row.planned_before, row.after, row.planned_after))
    planned = "-" if row.planned_ratio is None else f"{row.planned_ratio:.2f}"
    return row.recipe, row.metric, row.why or "-", *times, f"{row.ratio:.2f}{ends}", planned, "-" if row.off is None else f"{row.off:.0%}"
