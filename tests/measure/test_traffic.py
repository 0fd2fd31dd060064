"""The bytes that one token reads are counted once each, tied or packed; the bandwidth of this machine is a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from optkit.measure.traffic import parameters_of, read_bandwidth, weight_bytes_per_token
from optkit.transforms import Int8


class Tied(nn.Module):
    """An embedding that is the output head too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.table.weight


def test_every_matrix_is_read_once_and_of_an_embedding_one_row() -> None:
    assert weight_bytes_per_token(nn.Linear(8, 16)) == (8 * 16 + 16) * 4
    assert weight_bytes_per_token(Tied(tied=False)) == (4 + 2 * 4 + 40) * 4


def test_a_tied_head_is_the_read_of_its_table() -> None:
    assert weight_bytes_per_token(Tied(tied=True)) == (2 * 4 + 40) * 4


def test_shared_layers_are_read_once() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert weight_bytes_per_token(nn.ModuleList([layer, layer])) == 64 * 4  # type: ignore[arg-type]


def test_a_narrower_type_is_fewer_bytes() -> None:
    assert weight_bytes_per_token(nn.Linear(8, 16).bfloat16()) == (8 * 16 + 16) * 2


def test_packed_layers_are_counted_as_they_are_stored(mlp: Callable[[], nn.Module]) -> None:
    before = weight_bytes_per_token(mlp())
    after = weight_bytes_per_token(Int8().apply(mlp()))
    assert 0.25 < after / before < 0.3


def test_a_packed_tied_head_is_counted_once(tiny_llama: Callable[..., nn.Module]) -> None:
    dense = sum(parameter.numel() for parameter in tiny_llama().parameters())
    packed = weight_bytes_per_token(Int8().apply(tiny_llama()))
    assert packed < 1.2 * dense


@pytest.mark.parametrize("size_bytes", [0, 1 << 22])
def test_the_bandwidth_of_this_machine_is_plausible(size_bytes: int) -> None:
    assert 1e8 < read_bandwidth(size_bytes, repeats=5) < 1e13


def test_the_bandwidth_is_the_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    from optkit.measure import traffic

    marks = iter([0.0, 1.0, 0.0, 0.5, 0.0, 4.0])
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: next(marks))
    assert read_bandwidth(1 << 20, repeats=3) == 1 << 20


def test_packed_weights_are_counted_as_the_numbers_that_they_stand_for() -> None:
    plain = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 7))
    count = parameters_of(plain)
    packed = Int8().apply(plain)
    assert count == parameters_of(packed) == 32 * 48 + 48 + 48 * 7 + 7
    assert sum(parameter.numel() for parameter in packed.parameters()) < count
