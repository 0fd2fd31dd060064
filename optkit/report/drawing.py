"""One way to make a picture: a drawing to SVG text, the same bytes for the same drawing, whatever the user has set elsewhere."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS: Mapping[Any, Any] = {"svg.fonttype": "none", "font.size": 9.0, "axes.unicode_minus": False}


def drawn(draw: Callable[[Figure], None], inches: tuple[float, float], salt: str, settings: Mapping[Any, Any] | None = None) -> str:
    """Return the SVG text of what ``draw`` puts on a figure.

    Args:
        draw: is given the empty figure.
        inches: width and height.
        salt: what the names of the parts are made from.
        settings: of matplotlib, beside its defaults and ours.
    """
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    target = io.StringIO()
    with rc_context(), warnings.catch_warnings():
        rcdefaults()
        rcParams.update({**_SETTINGS, **(settings or {}), "svg.hashsalt": salt})
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return target.getvalue()
