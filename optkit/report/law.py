"""The law of a machine: parameters with intervals, errors, where each regime begins; and pictures of T(P, L) and Q(P, L)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.core import files
from optkit.measure.law import Law, Point
from optkit.report.drawing import drawn
from optkit.report.metrics import number
from optkit.report.table import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA = 2
_TOLD = {
    "forward_s": ("a forward, whatever it does", 1e6, "us"),
    "module_s": ("a module called, whatever it does", 1e6, "us"),
    "bandwidth": ("reading weights of large models", 1e-9, "GB/s"),
    "small_bandwidth": ("reading weights of small models", 1e-9, "GB/s"),
    "turning_bytes": ("weights where one becomes the other", 1e-6, "MB"),
    "peak": ("products of many rows", 1e-9, "GFLOP/s"),
    "half_rows": ("rows that reach half of it", 1.0, ""),
    "score_rate": ("scores and sums of values", 1e-9, "GFLOP/s"),
    "cache_bandwidth": ("keys and values", 1e-9, "GB/s"),
}


@dataclass(frozen=True)
class KindOfLaw:
    """The law of one kind of model. The errors are those of a fit without the ``held_out`` points, on these."""

    kind: str
    law: Law
    points: tuple[Point, ...]
    skipped: tuple[str, ...]
    held_out: int
    median_error: float
    p90_error: float


@dataclass(frozen=True)
class LawReport:
    """All kinds, and the machine."""

    environment: Mapping[str, Any]
    kinds: tuple[KindOfLaw, ...]

    def to_json(self) -> str:
        """Return the laws with their points as JSON."""
        kinds = [
            {
                "kind": each.kind,
                "law": each.law.plain(),
                "held_out": each.held_out,
                "median_error": each.median_error,
                "p90_error": each.p90_error,
                "skipped": each.skipped,
                "points": [asdict(point) | {"predicted_seconds": each.law.seconds(point.load)} for point in each.points],
            }
            for each in self.kinds
        ]
        return files.json_text({"schema": SCHEMA, "environment": dict(self.environment), "kinds": kinds})

    def to_markdown(self) -> str:
        """Return a table of parameters, one of errors, and the regimes of each model."""
        lines = ["# The law of this machine", "", f"- {self.environment['cpu']}, threads {self.environment['threads']}", ""]
        heads = ("term", "unit", *(each.kind for each in self.kinds))
        rows = [
            (told, unit, *(_with_interval(each.law, name, scale) for each in self.kinds)) for name, (told, scale, unit) in _TOLD.items()
        ]
        lines += [*markdown_table(heads, rows, text_columns=2), ""]
        judged = [
            (
                each.kind,
                str(len(each.points)),
                str(each.held_out),
                f"{each.median_error:.1%}",
                f"{each.p90_error:.1%}",
                str(len(each.skipped)),
            )
            for each in self.kinds
        ]
        lines += markdown_table(("kind", "points", "held out", "median error there", "90th percentile", "too long, left out"), judged)
        for each in self.kinds:
            lines += [
                "",
                f"## {each.kind}: what takes longest",
                "",
                *markdown_table(("model", "phase", "where"), _regimes(each), text_columns=3),
            ]
        return "\n".join(lines) + "\n"


def write_law(report: LawReport, folder: Path) -> None:
    """Write ``law.json``, ``table.md`` and a picture for each kind into a folder.

    Raises:
        ResourceError: the disk is full.
        PlaceError: the folder cannot be written.
    """
    files.write_text(folder / "law.json", report.to_json())
    files.write_text(folder / "table.md", report.to_markdown())
    for each in report.kinds:
        files.write_text(folder / f"{each.kind}.svg", pictures(each, str(report.environment["cpu"])))


def pictures(each: KindOfLaw, machine: str) -> str:
    """Return SVG text: time of the first and of later tokens against the size of the model, and tokens a second; points and law."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 2)
        batches = sorted({point.batch for point in each.points})
        draws: Sequence[tuple[Axes, str, int, str, Callable[[Point, float], float]]] = [
            (axes[0][0], "prefill", batches[0], "T: first token, ms", lambda point, seconds: seconds * 1e3),
            (axes[0][1], "decode", batches[0], "T: later token, ms", lambda point, seconds: seconds * 1e3),
            (axes[1][0], "prefill", batches[-1], "Q: prompt tokens/s", lambda point, seconds: point.batch * point.prompt / seconds),
            (axes[1][1], "decode", batches[-1], "Q: new tokens/s", lambda point, seconds: point.batch / seconds),
        ]
        for place, phase, batch, label, value in draws:
            _draw(place, each, phase, batch, label, value)
        figure.suptitle(f"{each.kind} on {machine}: points are measured, lines are the law", fontsize=10)

    return drawn(draw, (11, 7.5), each.kind)


def _draw(axes: Axes, each: KindOfLaw, phase: str, batch: int, label: str, value: Callable[[Point, float], float]) -> None:
    mine = [point for point in each.points if point.phase == phase and point.batch == batch]
    for number_, prompt in enumerate(sorted({point.prompt for point in mine})):
        row = sorted((point for point in mine if point.prompt == prompt), key=lambda point: point.parameters)
        sizes = [point.parameters / 1e6 for point in row]
        color = f"C{number_}"
        axes.plot(sizes, [value(point, point.seconds) for point in row], "o", color=color, markersize=5)
        axes.plot(sizes, [value(point, each.law.seconds(point.load)) for point in row], "-", color=color, label=f"L = {prompt}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({point.parameters / 1e6 for point in mine})
    axes.set_xticks(sizes, labels=[number(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("P: million parameters")
    axes.set_ylabel(f"{label} (batch {batch})")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8)


def _regimes(each: KindOfLaw) -> list[tuple[str, str, str]]:
    """Return for each model and phase the regimes in the order of the work, each with the first place where it is met."""
    rows = []
    models = dict.fromkeys(point.model for point in each.points)
    for model in models:
        for phase in ("prefill", "decode"):
            mine = sorted((p for p in each.points if p.model == model and p.phase == phase), key=lambda p: (p.batch * p.prompt, p.batch))
            met: dict[str, Point] = {}
            for point in mine:
                met.setdefault(each.law.regime(point.load), point)
            told = "; ".join(f"{name} from prompt {point.prompt}, batch {point.batch}" for name, point in met.items())
            rows.append((model, phase, told))
    return rows


def _with_interval(law: Law, name: str, scale: float) -> str:
    low, high = law.intervals[name]
    return f"{number(law.parameters[name] * scale)} [{number(low * scale)}, {number(high * scale)}]"
