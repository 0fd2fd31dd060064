"""Drawings as inline SVG that follows the page's colors, light or dark, without script. Same numbers in, same bytes out.

At most ``DRAWN`` samples of an arm are drawn, evenly chosen from the smallest to the largest; all of them are in samples.csv.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np

from optkit.report.drawing import drawn
from optkit.report.metrics import number
from optkit.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = 120
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_INK = "#010203"
_PAPER = "#030201"
_LEAST_SPAN = 0.1  # of the middle value
_COLORS = tuple(f"#0102{index:02x}" for index in range(16, 16 + len(MARKERS)))
_SETTINGS = {"font.size": 10.0, "text.parse_math": False, "path.simplify": False}


@dataclass(frozen=True)
class Point:
    """One mark of the quality-against-speed drawing. ``key`` stands beside it, ``title`` appears when it is pointed at."""

    key: str
    title: str
    x: float
    y: float
    simulated: bool = False


def samples_figure(samples: Mapping[str, Sequence[float]], axis: str, salt: str) -> str:
    """Return one strip per arm: a tick per sample, a bar from the lower to the upper quartile, a dot at the median.

    The axis ends at one and a half times the 99th percentile; how many samples lie beyond is written at the edge.
    """

    def draw(figure: Figure) -> dict[str, str]:
        axes = figure.subplots()
        values = {name: np.sort(np.asarray(taken, dtype=float)) for name, taken in samples.items()}
        pooled = np.concatenate(list(values.values()))
        end = float(min(pooled.max(), 1.5 * np.quantile(pooled, 0.99)))
        titles = {}
        for row, (name, taken) in enumerate(values.items()):
            _strip(axes, row, taken, end)
            quartiles = np.quantile(taken, (0.25, 0.5, 0.75))
            spread = f"median {number(quartiles[1])}, middle half {number(quartiles[0])} to {number(quartiles[2])}"
            titles[f"strip{row}"] = f"{name}: {len(taken)} samples, {spread}, largest {number(taken[-1])}"
        axes.set_yticks(range(len(values)), [plain(name, 24) for name in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlabel(plain(axis, 60))
        return titles

    return _svg(draw, (7.2, 0.75 + 0.42 * len(samples)), salt)


def quality_speed_figure(points: Sequence[Point], x_axis: str, y_axis: str, salt: str, legend: bool = True) -> str:
    """Return one mark per point; hollow where the speed is simulated. Without a legend the key is written beside each mark."""

    def draw(figure: Figure) -> dict[str, str]:
        axes = figure.subplots()
        titles = {}
        for index, point in enumerate(points):
            color, marker = _COLORS[index % len(_COLORS)], MARKERS[index % len(MARKERS)]
            face = _PAPER if point.simulated else color
            label = plain(point.key, 28) + (" (simulated)" if point.simulated else "")
            (mark,) = axes.plot(point.x, point.y, marker=marker, linestyle="none", color=color, label=label)
            mark.set(markerfacecolor=face, markersize=9, markeredgewidth=1.6)
            mark.set_gid(f"point{index}")
            titles[f"point{index}"] = point.title
            if not legend:
                axes.annotate(plain(point.key, 8), (point.x, point.y), xytext=(7, 5), textcoords="offset points", color=_INK)
        axes.margins(0.14)
        axes.ticklabel_format(useOffset=False)
        low, high = axes.get_ylim()
        middle, least = (low + high) / 2, abs(low + high) / 2 * _LEAST_SPAN
        if high - low < least:  # or a difference that means nothing would fill the picture
            axes.set_ylim(middle - least / 2, middle + least / 2)
        axes.set_xlabel(plain(x_axis, 60))
        axes.set_ylabel(plain(y_axis, 60))
        if legend:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=_INK)
        return titles

    return _svg(draw, (7.2, 3.6), salt)


def _strip(axes: Axes, row: int, taken: np.ndarray, end: float) -> None:
    color = _COLORS[row % len(_COLORS)]
    chosen = taken if len(taken) <= DRAWN else taken[np.linspace(0, len(taken) - 1, DRAWN).round().astype(int)]
    inside = chosen[chosen <= end]
    x = np.column_stack([inside, inside, np.full(len(inside), np.nan)]).ravel()
    y = np.tile([row - 0.16, row + 0.16, np.nan], len(inside))
    (ticks,) = axes.plot(x, y, color=color, linewidth=1.0)
    ticks.set_gid(f"strip{row}")
    low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75))
    axes.plot([low, high], [row + 0.26, row + 0.26], color=color, linewidth=3.0, solid_capstyle="butt")
    axes.plot([middle], [row + 0.26], marker=MARKERS[row % len(MARKERS)], markersize=6, color=color, markeredgecolor=_INK)
    beyond = int((taken > end).sum())
    if beyond:
        text = f"{beyond} beyond, up to {number(float(taken[-1]))} \N{RIGHTWARDS ARROW}"
        axes.annotate(text, (1.0, row - 0.22), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=_INK, fontsize=8)


def _svg(draw: Callable[[Figure], dict[str, str]], inches: tuple[float, float], salt: str) -> str:
    """Draw and return SVG text for use inside a page: colors as CSS variables, tool tips, no foreign address."""
    titles: dict[str, str] = {}

    def styled(figure: Figure) -> None:
        figure.patch.set_visible(False)
        titles.update(draw(figure))
        for axes in figure.axes:
            _style(axes)

    return _for_page(drawn(styled, inches, salt, _SETTINGS), titles, salt)


def _style(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(axis="x", color=_INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)


def _for_page(svg: str, titles: Mapping[str, str], salt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;|font: ([\d.]+px) [^;\"]*;", lambda found: f"font-size: {found[1]};" if found[1] else "", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor").replace(_PAPER, "var(--paper)")
    for index, color in enumerate(_COLORS):
        svg = svg.replace(color, f"var(--arm{index})")
    svg = re.sub(r' (d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), svg)
    for key, title in titles.items():
        svg = svg.replace(f'<g id="{key}">', f"<g><title>{escape(plain(title))}</title>")
    svg = re.sub(r'<g id="[\w.]+_\d+">', "<g>", svg)
    return svg.replace("<svg", f'<svg role="img" id="{salt}"', 1)
