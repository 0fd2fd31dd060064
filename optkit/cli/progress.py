"""What is being done, on standard error: one live line on a terminal, a plain line for each new step otherwise. Nothing draws by itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PLAIN_EVERY_S = 30.0


@contextmanager
def shown() -> Iterator[Callable[[str, float | None], None]]:
    """Yield a function that shows what is being done and how much of it is done."""
    if sys.stderr.isatty():
        with _live() as tell:
            yield tell
    else:
        yield _Plain()


@contextmanager
def _live() -> Iterator[Callable[[str, float | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # No refresh thread: it would take time from what is being measured.
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(doing: str, share: float | None) -> None:
            bar.update(task, description=doing, total=None if share is None else 1.0, completed=share or 0.0)
            bar.refresh()

        yield tell


class _Plain:
    """A line when something new begins, and one every half minute while it lasts."""

    def __init__(self) -> None:
        self._last = ""
        self._when = 0.0

    def __call__(self, doing: str, share: float | None) -> None:
        kind = doing.partition(":")[0] if share is not None else doing
        if kind != self._last or time.monotonic() - self._when > _PLAIN_EVERY_S:
            sys.stderr.write(f"{doing}{'' if share is None else f' ({share:.0%} of the time)'}\n")
            self._last, self._when = kind, time.monotonic()
