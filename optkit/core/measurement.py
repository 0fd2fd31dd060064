"""What was measured, and what a comparison of two measurements says. A number keeps its samples, unit and direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "same", "unclear"]
Array = NDArray[np.float64]
Samples = Mapping[str, Array]
"""Named columns. The first axis counts clusters, units drawn together when an interval is made: a request, or a window of text."""


@dataclass(frozen=True)
class Metric:
    """How one number is made from samples.

    ``estimate`` takes columns with one extra leading axis (draws, clusters, ...) and returns one value a draw (draws,). ``each``
    takes the columns as they are and returns the samples to keep in the record. ``relative`` metrics exist only against the baseline.
    """

    name: str
    unit: str
    higher_is_better: bool
    estimate: Callable[[Samples], Array]
    each: Callable[[Samples], Array]
    relative: bool = False


@dataclass(frozen=True)
class Measurement:
    """One metric of one arm. ``value`` is the estimate, ``samples`` what it was made from, in the order they were taken."""

    metric: str
    unit: str
    value: float
    samples: tuple[float, ...]
    higher_is_better: bool
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One metric, before and after. ``ratio`` is after/before with its 95 % interval; None where before is zero."""

    arm: str
    metric: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict
