"""report.html: one offline page without script, under 300 kB. Names are escaped; long texts are cut, and the record keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optkit.report.metrics import base_of, in_order, number, scale_of, title_of
from optkit.report.plots import DRAWN, MARKERS, Point, quality_speed_figure, samples_figure
from optkit.report.record import Arm, Metric, Report
from optkit.report.summary import AGAIN, HEADERS, axes_of, summarize, transforms_of
from optkit.report.text import plain

VERDICTS = ("better", "worse", "same", "unclear", "simulated")
_MOST_STRIPS = 4
_MOST_NOTES = 60
_LONGEST_RECIPE = 20_000


def to_html(report: Report, recipe_yaml: str) -> str:
    """Return the page of a report. ``recipe_yaml`` is shown as it is, up to 20,000 characters."""
    summary = summarize(report)
    speed, quality = axes_of(report)
    return render(
        "report.html",
        title=f"{summary.title}: before and after",
        summary=summary,
        headers=HEADERS,
        verdicts=VERDICTS,
        notes=[*summary.notes[:_MOST_NOTES], *_more(len(summary.notes) - _MOST_NOTES)],
        scatter=_scatter(report, speed, quality),
        scatter_caption=direction(speed, quality, _higher_is_better(report, quality)),
        strips=_strips(report),
        drawn=DRAWN,
        arms=[(plain(name, 60), arm, transforms_of(arm)) for name, arm in report.arms.items()],
        recipe=_readable(recipe_yaml),
        environment=list(_flat(report.environment)),
    )


def render(template: str, **values: Any) -> str:
    """Return a page of this package's templates. Everything is escaped but the drawings."""
    return _templates().get_template(template).render(**values)


def direction(speed: str, quality: str, higher_is_better: bool) -> str:
    """Return how to read the drawing of quality against speed."""
    side = "upper" if higher_is_better else "lower"
    return f"Better is to the left ({plain(speed, 60)}) and in the {side} part ({plain(quality, 60)})."


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("optkit.report", "templates"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain
    return environment


def _scatter(report: Report, speed: str, quality: str) -> Markup | None:
    points: list[Point] = []
    for name, arm in report.arms.items():
        x, y = _value(arm, speed), _value(arm, quality)
        if name != AGAIN and x is not None and y is not None and len(points) < len(MARKERS):
            title = f"{name}: {speed} {number(x)}, {quality} {number(y)}, {transforms_of(arm)}, {arm.dtype}"
            points.append(Point(name, title, x, y, arm.execution == "simulated"))
    if not points:
        return None
    return Markup(quality_speed_figure(points, speed, quality, "quality-speed"))


def _strips(report: Report) -> list[tuple[str, Markup]]:
    drawn: list[tuple[str, Markup]] = []
    for metric in _sampled(report)[:_MOST_STRIPS]:
        arms = [(name, arm.metrics[metric].samples) for name, arm in report.arms.items() if metric in arm.metrics]
        samples = {plain(name, 60): taken for name, taken in arms[: len(MARKERS)] if taken}
        figure = samples_figure(samples, title_of(metric, scale_of("ms", ())), f"samples-{len(drawn)}")
        drawn.append((plain(metric, 60), Markup(figure)))
    return drawn


def _sampled(report: Report) -> list[str]:
    """Return the times that have several samples; percentiles of gaps are no samples of their own."""
    entries = [(metric, entry) for arm in report.arms.values() for metric, entry in arm.metrics.items()]
    return in_order(metric for metric, entry in entries if _is_time(entry) and not base_of(metric)[0].startswith("itl_p"))


def _is_time(entry: Metric) -> bool:
    return entry.unit == "ms" and len(entry.samples) > 1


def _value(arm: Arm, metric: str) -> float | None:
    entry = arm.metrics.get(metric)
    return entry.value if entry else None


def _higher_is_better(report: Report, metric: str) -> bool:
    return any(arm.metrics[metric].higher_is_better for arm in report.arms.values() if metric in arm.metrics)


def _readable(recipe: str) -> str:
    lines = "\n".join(plain(line, _LONGEST_RECIPE) for line in recipe.splitlines())
    return lines if len(lines) <= _LONGEST_RECIPE else f"{lines[:_LONGEST_RECIPE]}\n… cut here; recipe.yaml holds the rest"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{plain(str(name), 60)}.")
        else:
            shown = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
            yield f"{prefix}{plain(str(name), 60)}", plain(shown or "none", 300)


def _more(count: int) -> Iterable[str]:
    return [f"and {count} more in report.json"] if count > 0 else []
