"""Choices under a budget, against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from optkit.transforms.quantize.budget import Option, upgrades, within


def drawn(seed: int) -> dict[str, list[Option]]:
    """Return up to five layers with up to four options each, errors in no order."""
    draw = random.Random(seed)
    return {
        f"layer{number}": [Option(f"o{index}", draw.randint(1, 9), draw.random()) for index in range(draw.randint(1, 4))]
        for number in range(draw.randint(1, 5))
    }


def total(choice: object) -> tuple[float, float]:
    picked = list(choice)  # type: ignore[call-overload]
    return sum(option.bits for option in picked), sum(option.error for option in picked)


@pytest.mark.parametrize("seed", range(60))
def test_a_choice_keeps_the_budget_and_is_off_the_best_by_one_upgrade_at_most(seed: int) -> None:
    options = drawn(seed)
    start, steps = upgrades(options)
    least, most = total(start.values())[0], sum(max(option.bits for option in found) for found in options.values())
    largest = max((before.error - after.error for before, after in pairs(start, steps)), default=0.0)
    for budget in (least, (least + most) / 2, most, most + 5):
        choice = within(options, budget)
        assert choice.keys() == options.keys()
        used, error = total(choice.values())
        assert used <= budget
        best = min(total(each)[1] for each in itertools.product(*options.values()) if total(each)[0] <= budget)
        assert best - 1e-9 <= error <= best + largest + 1e-9


def pairs(start: dict[str, Option], steps: list[tuple[str, Option]]) -> list[tuple[Option, Option]]:
    now, found = dict(start), []
    for layer, option in steps:
        found.append((now[layer], option))
        now[layer] = option
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_of_the_upgrades_is_the_best_choice_for_its_bits(seed: int) -> None:
    options = drawn(seed)
    choice, steps = upgrades(options)
    for layer, option in [(next(iter(options)), choice[next(iter(options))]), *steps]:
        choice[layer] = option
        used, error = total(choice.values())
        best = min(total(each)[1] for each in itertools.product(*options.values()) if total(each)[0] <= used)
        assert error == pytest.approx(best)


def test_a_budget_below_the_cheapest_is_told_with_what_that_takes() -> None:
    with pytest.raises(ValueError, match="7") as told:
        within({"a": [Option("x", 3, 1.0)], "b": [Option("x", 4, 1.0), Option("y", 5, 0.0)]}, 6)
    assert told.value.args == (7,)


def test_bits_that_buy_nothing_are_not_spent() -> None:
    assert within({"a": [Option("small", 4, 0.1), Option("large", 8, 0.1)]}, 100)["a"].name == "small"
