"""Which format each layer gets under a budget of bits, so that the sum of errors is least, up to one upgrade that does not fit any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One format of one layer: the bits that it takes in all, and the error that it causes."""

    name: str
    bits: float
    error: float


Choice = dict[str, Option]


def upgrades(options: Mapping[str, Sequence[Option]]) -> tuple[Choice, list[tuple[str, Option]]]:
    """Return each layer's cheapest option, and the upgrades from there, those first that save most error a bit.

    The greedy method for the multiple-choice knapsack (Sinha and Zoltners 1979): of each layer only those options count that lie on the
    lower convex hull of error over bits, so that a layer's upgrades come in order and every prefix of the list is a best choice for
    its own number of bits.
    """
    hulls = {layer: _hull(found) for layer, found in options.items()}
    start = {layer: hull[0] for layer, hull in hulls.items()}
    steps = [(_slope(before, after), layer, after) for layer, hull in hulls.items() for before, after in pairwise(hull)]
    ordered = sorted(range(len(steps)), key=lambda index: (-steps[index][0], index))
    return start, [(steps[index][1], steps[index][2]) for index in ordered]


def within(options: Mapping[str, Sequence[Option]], bits: float) -> Choice:
    """Return the choice that all upgrades make that still fit, taken in order; no other upgrade fits beside them.

    Its error is at most that of the best choice plus what the first upgrade that did not fit would save.

    Raises:
        ValueError: even the cheapest options take more bits; its argument is the number of bits that they take.
    """
    choice, steps = upgrades(options)
    used = sum(option.bits for option in choice.values())
    if used > bits:
        raise ValueError(used)
    stuck = set()
    for layer, option in steps:
        more = option.bits - choice[layer].bits
        if layer in stuck or used + more > bits:
            stuck.add(layer)  # what comes later for this layer costs more still
        else:
            choice[layer], used = option, used + more
    return choice


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull, from the fewest bits on; each has less error than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (before.error - after.error) / (after.bits - before.bits)
