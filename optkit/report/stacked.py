"""Stacked bars that fill their width: shares of several wholes side by side, as a picture by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optkit.report.drawing import drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _ROW, _FRAME = 9.0, 0.55, 1.5  # inches
_NAMED = 4.0  # per cent; a smaller share has no number in it


def stacked_bars(bars: Mapping[str, Mapping[str, float]], axis: str, title: str) -> str:
    """Return SVG text: one bar for each name, its parts as shares of their sum, the same color for the same part."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        starts = dict.fromkeys(bars, 0.0)
        for number, part in enumerate(parts):
            color = f"C{number}" if number < 10 else "0.6"
            shares = {name: 100 * bar.get(part, 0.0) / sum(bar.values()) for name, bar in bars.items()}
            axes.barh(list(bars), list(shares.values()), left=list(starts.values()), color=color, label=part, height=0.7)
            for row, (name, share) in enumerate(shares.items()):
                if share >= _NAMED:
                    axes.text(starts[name] + share / 2, row, f"{share:.0f}", ha="center", va="center", color="white")
                starts[name] += share
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(axis)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return drawn(draw, (_WIDTH, _FRAME + _ROW * len(bars) + 0.18 * len(parts) / 4), title)
