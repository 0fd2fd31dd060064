"""Exact counts, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.transforms.prune.masks import Pattern, beyond_pattern, smallest, smallest_in_rows

SCORES = st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.booleans())


def scores(rows: int, columns: int, seed: int, ties: bool) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (rows, columns), generator=made).float() if ties else torch.rand(rows, columns, generator=made)


@given(SCORES, st.floats(0.01, 0.99))
@settings(max_examples=80)
def test_a_share_is_exact_and_takes_the_smallest(shape: tuple[int, int, int, bool], share: float) -> None:
    found = scores(*shape)
    doomed = smallest(found, share)
    assert int(doomed.sum()) == round(share * found.numel())
    assert not doomed.any() or doomed.all() or found[doomed].max() <= found[~doomed].min()
    for row, mask in zip(found, smallest_in_rows(found, share), strict=True):
        assert int(mask.sum()) == round(share * len(row))
        assert not mask.any() or mask.all() or row[mask].max() <= row[~mask].min()


@given(SCORES, st.sampled_from(["1:2", "2:4", "4:8", "3:5"]))
@settings(max_examples=80)
def test_a_pattern_keeps_the_largest_of_every_group(shape: tuple[int, int, int, bool], text: str) -> None:
    pattern = Pattern.parse(text)
    rows, columns, seed, ties = shape
    found = scores(rows, columns * pattern.of, seed, ties)
    doomed = beyond_pattern(found, pattern).unflatten(1, (-1, pattern.of))
    assert ((~doomed).sum(-1) == pattern.kept).all()
    grouped = found.unflatten(1, (-1, pattern.of))
    assert (grouped.masked_fill(~doomed, -1).amax(-1) <= grouped.masked_fill(doomed, 9).amin(-1)).all()


@pytest.mark.parametrize("text", ["", "2", "2:2", "4:2", "0:4", "2:4:8", "2/4", "two:four", "2:65", " 2:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write 2:4 for 2 of every 4"):
        Pattern.parse(text)
