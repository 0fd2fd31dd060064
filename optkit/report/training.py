"""What a training came to: its scores beside those of an answer that takes no model, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optkit.core.files import json_text
from optkit.core.measurement import Comparison
from optkit.report.metrics import number
from optkit.report.table import markdown_table

SCHEMA = 2
_HEADERS = ("metric", "trivial answer (95 %)", "trained (95 %)", "ratio (95 %)", "verdict")


@dataclass(frozen=True)
class Score:
    """One metric of the answer that takes no model and of the trained network, each with its interval, and what comes of both.

    ``compared`` has their ratio, from items drawn in pairs, where the first is not zero.
    """

    compared: Comparison
    trivial: tuple[float, float]
    trained: tuple[float, float]


@dataclass(frozen=True)
class Training:
    """One training. ``scores`` set the trained network against the trivial answer, on the evaluated items."""

    network: str
    task: str
    corpus: str
    parameters: int
    items: dict[str, int]
    steps: int
    best: dict[str, float]
    trivial: str
    scores: tuple[Score, ...]
    artefact: str

    def to_json(self) -> str:
        """Return the training as JSON."""
        return json_text({"schema": SCHEMA, **asdict(self)})

    def to_markdown(self) -> str:
        """Return the training as a table with a few lines of facts."""
        items = ", ".join(f"{count:,} {side}" for side, count in self.items.items())
        facts = [
            f"# {self.network} on {self.task}",
            "",
            f"- {self.parameters:,} parameters; data: {self.corpus}: {items}",
            f"- {self.steps} steps, best after {self.best['step']:.0f}: validation loss {self.best['loss']:.4f}",
            f"- trivial answer: {self.trivial}",
            f"- kept in {self.artefact}",
            "",
        ]
        return "\n".join([*facts, *markdown_table(_HEADERS, [_row(score) for score in self.scores]), ""])


def _row(score: Score) -> Sequence[Any]:
    found = score.compared
    ratio = "-" if found.ratio is None else f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]"
    return found.metric, _with_interval(found.before, score.trivial), _with_interval(found.after, score.trained), ratio, found.verdict


def _with_interval(value: float, ends: tuple[float, float]) -> str:
    return f"{number(value)} [{number(ends[0])}, {number(ends[1])}]"
