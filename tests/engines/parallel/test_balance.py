"""Stages of about equal time."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optkit.core.errors import TransformError
from optkit.engines.parallel.balance import Times, balanced, shared, step_times, usual
from optkit.engines.parallel.stages import bounds_of

SECONDS = st.floats(0.1, 10)


def slowest(times: Times, counts: tuple[int, ...]) -> float:
    edges = [0, *(sum(counts[: index + 1]) for index in range(len(counts)))]
    costs = [sum(times.blocks[start:end]) for start, end in pairwise(edges)]
    costs[0] += times.before
    costs[-1] += times.after
    return max(costs)


@settings(max_examples=60, deadline=None)
@given(before=SECONDS, blocks=st.lists(SECONDS, min_size=3, max_size=8), after=SECONDS, stages=st.integers(1, 3))
def test_no_other_cut_has_a_faster_slowest_stage(before: float, blocks: list[float], after: float, stages: int) -> None:
    times = Times(before, tuple(blocks), after)
    found = balanced(times, stages)
    assert len(found) == stages and sum(found) == len(blocks) and min(found) >= 1
    others = [
        tuple(end - start for start, end in pairwise([0, *cuts, len(blocks)])) for cuts in combinations(range(1, len(blocks)), stages - 1)
    ]
    assert slowest(times, found) == pytest.approx(min(slowest(times, counts) for counts in others))


def test_a_heavy_head_takes_blocks_off_the_last_stage() -> None:
    assert balanced(Times(0.0, (1.0,) * 8, 4.0), 2) == (6, 2)


def test_times_are_measured_for_every_block(tiny_llama) -> None:
    times = step_times(tiny_llama())
    assert len(times.blocks) == 3 and min(*times.blocks, times.before, times.after) > 0


def test_blocks_of_one_shape_have_one_time_and_others_their_own() -> None:
    assert shared(["wide", "wide", "narrow", "wide"], [4.0, 5.0, 1.0, 9.0]) == (5.0, 5.0, 1.0, 5.0)


def test_neither_slow_spells_nor_one_lucky_part_change_the_shares_of_a_step() -> None:
    step = [1.0, 4.0, 10.0]
    slow, lucky = [3 * part for part in step], [1.0, 4.0, 8.0]
    assert usual([step, slow, step, lucky, slow, slow, step]) == pytest.approx(step)
    assert usual([slow, step, slow, slow, step]) == pytest.approx(slow)


def test_the_measured_times_of_blocks_that_differ_are_not_mixed(tiny_llama) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = nn.Identity()
    first, without_ffn, last = step_times(model).blocks
    assert first == last and without_ffn < first


@pytest.mark.parametrize(("counts", "told"), [((2, 2), "are 2 with 4 blocks; expected 2 with 3"), ((3,), "are 1 with 3 blocks")])
def test_counts_that_do_not_fit_are_refused_with_the_numbers(counts: tuple[int, ...], told: str) -> None:
    with pytest.raises(TransformError, match=told):
        bounds_of(3, 2, counts)


def test_more_stages_than_blocks_are_refused(tiny_llama) -> None:
    assert isinstance(tiny_llama(), nn.Module)
    with pytest.raises(TransformError, match="3 blocks cannot be shared by 4 stages; use size 3 at most"):
        bounds_of(3, 4, ())
