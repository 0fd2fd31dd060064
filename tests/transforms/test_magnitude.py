"""Exact counts of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optkit.core.errors import TargetError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.transforms import Int8, Magnitude
from optkit.transforms.prune.magnitude import zero_smallest

Subjects = Callable[..., Subject]


def zeros(module: nn.Module) -> dict[str, tuple[int, int]]:
    layers = {name: layer.weight for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in layers.items()}


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.333, 0.999])
def test_every_layer_loses_exactly_its_share(subject: Subjects, sparsity: float) -> None:
    counts = zeros(Magnitude(sparsity=sparsity).apply(subject(tie_word_embeddings=False)).module)
    assert counts.pop("lm_head")[0] == 0
    assert len(counts) == 21
    assert all(count == round(sparsity * size) for count, size in counts.values())


def test_all_layers_together_lose_exactly_the_share_and_the_smallest(subject: Subjects) -> None:
    whole = subject()
    with torch.no_grad():
        whole.module.model.layers[0].mlp.up_proj.weight.mul_(0.01)  # type: ignore[index,union-attr]
    counts = zeros(Magnitude(sparsity=0.25, scope="global").apply(whole).module)
    counts.pop("lm_head")
    assert sum(count for count, _ in counts.values()) == round(0.25 * sum(size for _, size in counts.values()))
    assert counts["model.layers.0.mlp.up_proj"][0] > 0.95 * counts["model.layers.0.mlp.up_proj"][1]


@given(st.integers(1, 7), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=60)
def test_what_stays_is_never_smaller_than_what_went(rows: int, columns: int, sparsity: float, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    weights = [torch.randint(1, 5, (rows, columns), generator=made).float() * size for size in (-1, 1)]
    before = [weight.clone() for weight in weights]
    zero_smallest(weights, sparsity)
    gone = torch.cat([old[new == 0].abs() for old, new in zip(before, weights, strict=True)])
    kept = torch.cat([new[new != 0].abs() for new in weights])
    assert gone.numel() == round(sparsity * 2 * rows * columns)
    assert not gone.numel() or not kept.numel() or gone.max() <= kept.min()
    assert all(((new == old) | (new == 0)).all() for old, new in zip(before, weights, strict=True))


def test_equal_weights_are_still_counted_exactly() -> None:
    weight = torch.ones(10, 10)
    zero_smallest([weight], 0.37)
    assert int((weight == 0).sum()) == 37


def test_a_head_tied_to_the_embedding_and_the_embedding_stay_whole(subject: Subjects) -> None:
    module = Magnitude(sparsity=0.9).apply(subject()).module
    assert not (module.model.embed_tokens.weight == 0).any()  # type: ignore[union-attr]


def test_a_plain_module_with_a_tied_head_keeps_its_embedding_too() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(10, 8), "hidden": nn.Linear(8, 8), "head": nn.Linear(8, 10, bias=False)})
    module["head"].weight = module["embed"].weight
    counts = zeros(Magnitude().apply(module))
    assert counts == {"hidden": (32, 64), "head": (0, 80)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_targets_choose_the_layers(subject: Subjects, scope: Literal["layer", "global"]) -> None:
    transform = Magnitude(scope=scope, targets=Targets(include=("*.mlp.*",), exclude=("down_proj",)))
    counts = zeros(transform.apply(subject()).module)
    assert {name.rpartition(".")[2] for name, (count, _) in counts.items() if count} == {"up_proj", "gate_proj"}


def test_a_pattern_that_matches_nothing_is_refused_before_a_weight_is_touched(subject: Subjects) -> None:
    whole = subject()
    with pytest.raises(TargetError, match="'mlps' matches none"):
        Magnitude(targets=Targets(include=("mlps",))).apply(whole)
    assert sum(count for count, _ in zeros(whole.module).values()) == 0


def test_packed_layers_are_no_target_any_more(subject: Subjects) -> None:
    packed = Int8(targets=Targets(include=("*.mlp.*",))).apply(subject())
    counts = zeros(Magnitude(sparsity=0.5).apply(packed).module)
    assert all((count == size // 2) == ("self_attn" in name) for name, (count, size) in counts.items())
