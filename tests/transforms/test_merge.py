"""Averages of models: their laws, and that models which do not fit are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms import Merge
from optkit.transforms.distill.losses import next_token_loss
from optkit.transforms.merge.rules import average, greedy_soup, slerp, task_arithmetic

Llama = Callable[..., nn.Module]


def states(count: int) -> list[dict[str, Tensor]]:
    return [{"weight": torch.randn(3, 4), "steps": torch.tensor(index)} for index in range(count)]


def test_the_average_is_that_of_every_tensor_and_counters_are_the_first_ones() -> None:
    three = states(3)
    merged = average(three)
    torch.testing.assert_close(merged["weight"], sum(state["weight"] for state in three) / 3)
    assert int(merged["steps"]) == 0
    weighted = average(three[:2], [3, 1])
    torch.testing.assert_close(weighted["weight"], 0.75 * three[0]["weight"] + 0.25 * three[1]["weight"])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_on_the_arc_the_angle_and_the_length_go_evenly(share: float) -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    found = slerp({"w": a}, {"w": b}, share)["w"]
    expected = [2 * math.cos(share * math.pi / 2), 2 * math.sin(share * math.pi / 2), 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "other", [torch.ones(3), 2 * torch.ones(3), -torch.ones(3), torch.zeros(3)], ids=["same", "longer", "opposite", "zero"]
)
def test_where_there_is_no_arc_the_line_is_straight(other: Tensor) -> None:
    torch.testing.assert_close(slerp({"w": torch.ones(3)}, {"w": other}, 0.25)["w"], 0.75 * torch.ones(3) + 0.25 * other)


def test_what_two_models_have_learned_since_is_added_up() -> None:
    base, one, other = states(3)
    found = task_arithmetic(base, [one, other], scale=0.5)["weight"]
    torch.testing.assert_close(found, base["weight"] + 0.5 * (one["weight"] + other["weight"] - 2 * base["weight"]))


def test_a_greedy_soup_takes_in_only_what_helps() -> None:
    goal = torch.zeros(4)
    pot = [{"w": goal + torch.tensor([1.0, 0, 0, 0])}, {"w": goal - torch.tensor([1.0, 0, 0, 0])}, {"w": goal + 9}]
    merged, chosen = greedy_soup(pot, lambda state: float((state["w"] - goal).norm()))
    assert chosen == [0, 1]
    assert torch.equal(merged["w"], goal)


def test_models_of_another_shape_are_refused_with_the_tensor() -> None:
    with pytest.raises(TransformError, match=r"model 2 of 2 has another shape than the first: w is \(4,\), not \(3,\)"):
        average([{"w": torch.ones(3)}, {"w": torch.ones(4)}])
    with pytest.raises(TransformError, match="v is not there, not"):
        slerp({"w": torch.ones(3), "v": torch.ones(1)}, {"w": torch.ones(3)}, 0.5)


@pytest.mark.parametrize("method", ["average", "greedy", "slerp", "task_arithmetic"])
def test_in_a_recipe_the_others_are_opened_and_ties_stay(tiny_llama: Llama, method: Any) -> None:
    data = Calibration(({"input_ids": torch.randint(2, 96, (2, 16))},), open_model=lambda spec: tiny_llama(seed=int(spec)))
    own, other = tiny_llama(seed=0).state_dict(), tiny_llama(seed=1).state_dict()
    merged = Merge(models=("1",), method=method).apply(tiny_llama(seed=0), data)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # type: ignore[union-attr]
    name = "model.layers.1.mlp.up_proj.weight"
    expected = {
        "average": (own[name] + other[name]) / 2,
        "slerp": slerp({"w": own[name]}, {"w": other[name]}, 0.5)["w"],
        "task_arithmetic": other[name],
    }
    if method in expected:
        torch.testing.assert_close(merged.state_dict()[name], expected[method])
    else:
        losses = {}
        for label, module in (("own", tiny_llama(seed=0)), ("other", tiny_llama(seed=1)), ("merged", merged)):
            with torch.no_grad():
                losses[label] = float(next_token_loss(module, module(**data.batches[0]), data.batches[0]))
        assert losses["merged"] <= min(losses["own"], losses["other"]) + 1e-6


def test_what_cannot_be_merged_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ValidationError, match="slerp goes from this model to one other; got 2 others"):
        Merge(models=("a", "b"), method="slerp")
    with pytest.raises(TransformError, match="merge opens its models in a recipe"):
        Merge(models=("a",)).apply(tiny_llama())
    wider = Calibration((), open_model=lambda spec: tiny_llama(intermediate_size=64))
    with pytest.raises(TransformError, match="only models of one shape can be merged"):
        Merge(models=("a",)).apply(copy.deepcopy(tiny_llama()), wider)
