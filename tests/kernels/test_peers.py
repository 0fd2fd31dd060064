"""Sums over processes: exact in every length, the same bits for everyone, and an end to waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optkit.core.errors import ArmError
from optkit.kernels.native import native
from optkit.kernels.peers import SharedPeers, shared_file

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled kernels are not here")
Together = Callable[[int, Callable[[SharedPeers], Tensor]], list[Tensor]]


@pytest.fixture
def place() -> Iterator[Callable[[int], Path]]:
    made: list[Path] = []

    def make(size: int) -> Path:
        made.append(shared_file(size))
        return made[-1]

    yield make
    for path in made:
        path.unlink()


@pytest.fixture
def together(place: Callable[[int], Path]) -> Together:
    """Run the same calls for each of some peers, in threads: the kernel lets go of the interpreter while it waits."""

    def act(size: int, work: Callable[[SharedPeers], Tensor]) -> list[Tensor]:
        path = place(size)
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda rank: work(SharedPeers(path, rank, size)), range(size)))

    return act


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, (1 << 18) + 1])
def test_everyone_gets_the_same_bits_and_they_are_the_sum(together: Together, size: int, length: int) -> None:
    numbers = torch.randn(size, length)
    sums = together(size, lambda peers: peers.sum(numbers[peers.rank].clone()))
    assert all(torch.equal(sums[0], other) for other in sums)
    torch.testing.assert_close(sums[0].double(), numbers.double().sum(0), rtol=1e-5, atol=1e-5)


def test_many_sums_in_a_row_do_not_mix(together: Together) -> None:
    def work(peers: SharedPeers) -> Tensor:
        return torch.stack([peers.sum(torch.full((7,), float(turn * (peers.rank + 1)))) for turn in range(500)])

    expected = torch.arange(500.0)[:, None].expand(500, 7) * 3
    assert all(torch.equal(found, expected) for found in together(2, work))


def test_half_precision_is_summed_in_float32_and_returned_as_it_came(together: Together) -> None:
    numbers = torch.randn(3, 2, 40).bfloat16()
    for found in together(3, lambda peers: peers.sum(numbers[peers.rank])):
        assert found.dtype is torch.bfloat16 and found.shape == (2, 40)
        assert torch.equal(found, numbers.float().sum(0).bfloat16())


def test_who_does_not_come_is_named_in_time(place: Callable[[int], Path]) -> None:
    peers = SharedPeers(place(3), 1, 3, limit_s=0.2)
    with pytest.raises(ArmError, match=r"shard 0 did not come to a sum within 0\.2 s"):
        peers.sum(torch.zeros(4))
