"""Settings hold and check values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError

from optkit.core.settings import Settings


class Oven(Settings):
    heat: float = Field(default=180.0, gt=0)
    minutes: int = 30
    name: str = "oven"
    racks: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "values",
    [
        {"heat": "180"},
        {"minutes": 30.5},
        {"minutes": "30"},
        {"minutes": True},
        {"name": 3},
        {"heat": float("nan")},
        {"heat": float("inf")},
        {"heat": -1},
    ],
    ids=repr,
)
def test_a_value_of_the_wrong_kind_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Oven(**values)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="hot"):
        Oven(hot=1)  # type: ignore[call-arg]


def test_settings_do_not_change() -> None:
    oven = Oven()
    with pytest.raises(ValidationError, match="frozen"):
        oven.heat = 200.0
    assert hash(oven) == hash(Oven())


def test_a_wrong_default_is_refused_too() -> None:
    class Broken(Settings):
        minutes: int = "soon"  # type: ignore[assignment]

    with pytest.raises(ValidationError, match="minutes"):
        Broken()
