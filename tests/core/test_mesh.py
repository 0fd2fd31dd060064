"""Which process has which part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optkit.core.mesh import Mesh, Place

SIZES = st.integers(1, 5)


@given(data=SIZES, pipeline=SIZES, tensor=SIZES)
def test_every_part_is_somebodys_and_nobody_has_two(data: int, pipeline: int, tensor: int) -> None:
    mesh = Mesh(data, pipeline, tensor)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert len(set(places)) == mesh.size == data * mesh.parts
    assert places[0] == Place(0, 0, 0) and places[-1] == Place(data - 1, pipeline - 1, tensor - 1)


def test_shards_of_a_stage_are_neighbours() -> None:
    places = [Mesh(data=2, pipeline=2, tensor=2).place(rank) for rank in range(8)]
    assert places[1] == Place(0, 0, 1) and places[2] == Place(0, 1, 0) and places[4] == Place(1, 0, 0)
