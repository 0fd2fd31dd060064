"""What of a task's needs a network can meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optkit.core.errors import ModelError


def for_windows(needs: Mapping[str, Any], network: str) -> tuple[int, int, int]:
    """Return the number of series, of days seen and of days forecast.

    Raises:
        ModelError: the task has no series.
    """
    if needs.get("per") != "window":
        raise ModelError(
            f"{network} forecasts series, and this task asks for answers per {needs.get('per', 'nothing')}; use another network"
        )
    return int(needs["channels"]), int(needs["window"]), int(needs["horizon"])


def for_items(needs: Mapping[str, Any], network: str) -> tuple[int, list[str]]:
    """Return the number of token ids and the classes of items.

    Raises:
        ModelError: the task has none.
    """
    if needs.get("per") != "item":
        raise ModelError(
            f"{network} gives one class an item, and this task asks for answers per {needs.get('per', 'nothing')}; use another"
        )
    return int(needs["vocabulary"]), list(needs["labels"])
