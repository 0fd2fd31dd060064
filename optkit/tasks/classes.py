"""Precision, recall and F1 by class for many draws at once: what scikit-learn's functions give for one draw at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from optkit.core.measurement import Array


class Counts(NamedTuple):
    """For each draw and class (..., classes): items rightly given this class, given it at all, and that belong to it."""

    hits: Array
    given: Array
    right: Array


Score = Callable[[Counts], Array]


def counts(right: Array, given: Array, classes: int) -> Counts:
    """Return the counts of class numbers (..., items)."""
    ours, theirs = (np.stack([side == number for number in range(classes)], -1) for side in (given, right))
    return Counts(*((part).sum(-2).astype(np.float64) for part in (ours & theirs, ours, theirs)))


def precision(found: Counts) -> Array:
    """Return hits / given; 0 for a class that is never given."""
    return found.hits / np.maximum(found.given, 1)


def recall(found: Counts) -> Array:
    """Return hits / right; 0 for a class that nothing belongs to."""
    return found.hits / np.maximum(found.right, 1)


def f1(found: Counts) -> Array:
    """Return 2 hits / (given + right); 0 for a class of nothing."""
    return 2 * found.hits / np.maximum(found.given + found.right, 1)
