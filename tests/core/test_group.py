"""How ranks share rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.core.group import Group
from optkit.core.mesh import Mesh


@given(count=st.integers(0, 200), size=st.integers(1, 17))
def test_the_shares_cover_everything_once_in_order_and_differ_by_one_at_most(count: int, size: int) -> None:
    rows = list(range(count))
    shares = [rows[Group(rank, size).rows(count)] for rank in range(size)]
    assert [row for share in shares for row in share] == rows
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_a_group_of_one_keeps_values_and_does_not_wait() -> None:
    alone = Group()
    assert alone.join((1, "a")) == [1, "a"]
    assert alone.slowest([3.0, 1.0]) == [3.0, 1.0]
    alone.wait()


def test_the_slowest_rank_counts_at_each_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "_gather", lambda self, values: [[1.0, 9.0], [], [4.0, 2.0]])
    assert Group(0, 3).slowest([1.0, 9.0]) == [4.0, 9.0]


def test_rows_go_to_replicas_and_the_first_process_of_each_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group(rank, 4, Mesh(data=2, tensor=2)) for rank in range(4)]
    assert [group.rows(5) for group in groups] == [slice(0, 3), slice(0, 3), slice(3, 5), slice(3, 5)]
    monkeypatch.setattr(Group, "_gather", lambda self, values: [["a", "b"], ["a", "b"], ["c"], ["c"]])
    assert groups[0].join(["a", "b"]) == ["a", "b", "c"]
