"""Names to classes, imported on use; plugins by entry point."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from optkit.core import registry
from optkit.core.errors import OptkitError
from optkit.core.registry import Registry, UnknownNameError, did_you_mean


def make() -> Registry[object]:
    return Registry("animal", {"cat": "collections:Counter", "crow": "collections:OrderedDict", "ghost": "no_such_module_at_all:Ghost"})


def plug(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> list[str]:
    asked: list[str] = []

    def fake(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", fake)
    return asked


def test_listing_names_imports_nothing() -> None:
    sys.modules.pop("wave", None)
    animals: Registry[object] = Registry("animal", {"wave": "wave:Wave_read"})
    assert list(animals) == ["wave"]
    assert "wave" in animals
    assert "wave" not in sys.modules
    assert animals["wave"].__name__ == "Wave_read"
    assert "wave" in sys.modules


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown animal 'crw'; did you mean 'crow'\?"):
        make()["crw"]


def test_where_no_name_is_near_all_of_them_are_told() -> None:
    assert make().unknown("xylophone") == "unknown animal 'xylophone'; known: cat, crow, ghost"


def test_a_long_list_of_names_is_not_told() -> None:
    assert did_you_mean("zzz", [f"name{number}" for number in range(25)]) == ""


def test_a_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plug(monkeypatch, EntryPoint("dog", "fractions:Fraction", "optkit.animals"), EntryPoint("oak", "x:Y", "optkit.trees"))
    animals = make()
    assert list(animals) == ["cat", "crow", "ghost", "dog"]
    assert len(animals) == 4
    assert animals["dog"].__name__ == "Fraction"
    assert asked == ["optkit.animals"]


def test_a_plugin_cannot_take_over_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, EntryPoint("cat", "fractions:Fraction", "optkit.animals"))
    with pytest.raises(OptkitError, match="registers animal 'cat', which exists already"):
        make()["cat"]


def test_a_clash_of_plugins_is_refused_again_at_the_next_use(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, EntryPoint("cat", "fractions:Fraction", "optkit.animals"))
    animals = make()
    for _ in range(2):
        with pytest.raises(OptkitError, match="exists already"):
            len(animals)


def test_two_plugins_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("dog", "fractions:Fraction", "optkit.animals")
    plug(monkeypatch, point, EntryPoint("dog", "decimal:Decimal", "optkit.animals"))
    with pytest.raises(OptkitError, match="'dog'"):
        list(make())
