"""What a training came to: its scores beside those of an answer that takes no model, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optkit.core.measurement import Comparison
from optkit.report.metrics import number
from optkit.report.table import markdown_table

SCHEMA = 1
_HEADERS = ("metric", "trivial answer", "trained", "ratio (95 % interval)", "verdict")


@dataclass(frozen=True)
class Training:
    """One training. ``scores`` set the trained network (after) against the trivial answer (before), on the evaluated items."""

    network: str
    task: str
    corpus: str
    parameters: int
    items: dict[str, int]
    steps: int
    best: dict[str, float]
    trivial: str
    scores: tuple[Comparison, ...]
    artefact: str

    def to_json(self) -> str:
        """Return the training as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False) + "\n"

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


def _row(score: Comparison) -> Sequence[Any]:
    ratio = "-" if score.ratio is None else f"{score.ratio:.2f} [{score.low:.2f}, {score.high:.2f}]"
    return score.metric, number(score.before), number(score.after), ratio, score.verdict
