"""The task's quality metrics, for the whole evaluation data."""

from __future__ import annotations

from optkit.measure.contract import Meter


class Quality(Meter):
    """No settings: what is judged, and how, is the task's own matter."""
