"""Include and exclude patterns over module names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.core.errors import TargetError
from optkit.core.targets import Targets, matches

NAMES = ["model.layers.0.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.q_proj", "lm_head"]


def test_without_patterns_all_layers_are_selected() -> None:
    assert Targets().select(NAMES) == NAMES


def test_a_pattern_without_a_dot_matches_the_last_part_of_a_name() -> None:
    assert Targets(include=("q_proj",)).select(NAMES) == [NAMES[0], NAMES[2]]


def test_a_pattern_with_a_dot_matches_the_whole_name() -> None:
    assert Targets(include=("model.layers.0.*",)).select(NAMES) == NAMES[:2]
    assert not matches("layers.0.q_proj", NAMES[0])


def test_exclude_wins_over_include() -> None:
    assert Targets(include=("*proj",), exclude=("*.1.*", "down_proj")).select(NAMES) == [NAMES[0]]


@pytest.mark.parametrize("targets", [Targets(include=("*", "k_proj")), Targets(exclude=("k_proj",))], ids=["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_a_near_layer(targets: Targets) -> None:
    with pytest.raises(TargetError, match=r"'k_proj' matches none of the 4 layers \(.*, \.\.\.\); did you mean 'q_proj'\?"):
        targets.select(NAMES)


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(TargetError, match="leaves none of the 4 layers"):
        Targets(exclude=("*",)).select(NAMES)


def test_an_exclude_pattern_may_name_what_could_never_be_selected() -> None:
    assert Targets(exclude=("experts",)).select(NAMES, others=["model.layers.0.experts"]) == NAMES


def test_an_include_pattern_may_not_name_what_can_never_be_selected() -> None:
    with pytest.raises(TargetError, match="'experts' matches none"):
        Targets(include=("*", "experts")).select(NAMES, others=["model.layers.0.experts"])


@given(st.lists(st.from_regex(r"[a-c]{1,2}(\.[a-c]{1,2}){0,2}", fullmatch=True), min_size=1, unique=True), st.data())
def test_what_is_selected_is_what_the_patterns_say(names: list[str], data: st.DataObject) -> None:
    include, exclude = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    expected = [name for name in names if matches(include, name) and not matches(exclude, name)]
    try:
        assert Targets(include=(include,), exclude=(exclude,)).select(names) == expected
    except TargetError:
        assert not expected
