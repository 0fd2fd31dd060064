"""Four sides that share nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.core.errors import DataError
from optkit.data.docstrings import PACKAGES, by_package
from optkit.data.sides import SIDES, Labelled, parted, shares_of, side_of


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=300))
def test_no_item_and_no_key_stands_on_two_sides(keyed: list[tuple[str, str]]) -> None:
    try:
        sides = parted("drawn", keyed)
    except DataError:
        return
    for one, other in itertools.combinations(SIDES, 2):
        assert not set(sides.of(one)) & set(sides.of(other))
    assert {item for side in SIDES for item in sides.of(side)} == {item for _, item in keyed}
    for side in SIDES:
        keys = {key for key, item in keyed if item in sides.of(side)}
        assert any(side_of(key) == side for key in keys)


def test_the_sides_have_their_shares_and_an_item_more_moves_none() -> None:
    keyed = [(f"file {number}", number) for number in range(4000)]
    sides = parted("a", keyed)
    shares = {side: len(sides.of(side)) / len(keyed) for side in SIDES}
    assert shares == pytest.approx({"training": 10 / 16, "validation": 1 / 16, "calibration": 2 / 16, "evaluation": 3 / 16}, abs=0.02)
    assert set(sides.evaluation) <= set(parted("a", [*keyed, ("one more", -1)]).evaluation)
    with pytest.raises(DataError, match=r"too little for four sides \(training 1, validation 0"):
        parted("b", [("file 0", 0)])


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 40), min_size=40, max_size=60))
def test_groups_are_shared_out_near_the_shares(sizes: dict[str, int]) -> None:
    found = shares_of(sizes)
    assert found.keys() == sizes.keys() and found == shares_of(dict(reversed(sizes.items())))
    total = sum(sizes.values())
    for side, share in {"training": 10, "validation": 1, "calibration": 2, "evaluation": 3}.items():
        got = sum(size for name, size in sizes.items() if found[name] == side)
        assert abs(got - share * total / 16) <= max(sizes.values())


def test_docstrings_stand_on_the_side_of_their_file_without_the_name_of_their_package() -> None:
    sides = by_package()
    everyone = [item for side in SIDES for item in sides.of(side)]
    assert len({item.label for item in everyone}) == PACKAGES
    assert len(everyone) == len({item.text for item in everyone}) > 2000
    assert all(item.label not in item.text.lower() and isinstance(item, Labelled) for item in everyone)
    assert all({item.label for item in sides.of(side)} == {item.label for item in everyone} for side in ("training", "evaluation"))
