"""Shorter models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms import DropLayers, Plan
from optkit.transforms.distill.losses import next_token_loss
from optkit.transforms.layers import blocks
from optkit.transforms.prune.drop_layers import block_influence, drop

Subjects = Callable[..., Subject]


def make_identity(block: Any) -> None:
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (DropLayers(count=3), "cannot drop 3 of the 3 blocks of model.layers; at least one must stay: count at most 2"),
        (DropLayers(count=9), "cannot drop 9 of the 3 blocks"),
        (DropLayers(layers=(0, 1, 2)), "cannot drop 3 of the 3 blocks"),
        (DropLayers(layers=(1, 3)), "model.layers has blocks 0 to 2, there is no 3"),
    ],
    ids=["all", "more than all", "all by name", "one beyond"],
)
def test_blocks_that_cannot_go_are_refused_in_check_and_in_apply(
    subject: Subjects, calibration: Calibration, transform: DropLayers, words: str
) -> None:
    with pytest.raises(TransformError, match=words):
        transform.check(Plan(subject()))
    with pytest.raises(TransformError, match=words):
        transform.apply(subject(), calibration)


def test_without_data_it_cannot_choose_and_says_what_to_do(subject: Subjects) -> None:
    assert DropLayers().needs_data
    assert not DropLayers(layers=(1,)).needs_data
    for data in (None, Calibration()):
        with pytest.raises(TransformError, match=r"needs calibration data to choose the blocks; name them instead: layers: \[5, 6\]"):
            DropLayers().apply(subject(), data)


def test_naming_a_block_twice_drops_it_once(subject: Subjects) -> None:
    assert len(blocks(DropLayers(layers=(1, 1)).apply(subject()).module)[1]) == 2


@pytest.mark.parametrize("idle", [0, 2, 3])
def test_the_block_that_changes_least_goes_and_nothing_is_lost(
    subject: Subjects, calibration: Calibration, logits: Callable[[nn.Module], Tensor], idle: int
) -> None:
    whole = subject(num_hidden_layers=4)
    stack = blocks(whole.module)[1]
    make_identity(stack[idle])
    kept = [block for index, block in enumerate(stack) if index != idle]
    before = logits(whole.module)
    influence = block_influence(whole.module, calibration)
    assert influence[idle] == pytest.approx(0, abs=1e-6)
    assert min(influence[:idle] + influence[idle + 1 :]) > 1e-3
    shorter = DropLayers(count=1).apply(whole, calibration)
    assert list(blocks(shorter.module)[1]) == kept
    assert torch.equal(logits(shorter.module), before)


def test_influence_is_one_minus_the_cosine_over_all_positions(subject: Subjects, calibration: Calibration) -> None:
    module = subject().module
    states: list[Tensor] = []
    with torch.no_grad():
        for batch in calibration.batches:
            hidden = module(**batch, output_hidden_states=True).hidden_states
            states.append(1 - torch.cosine_similarity(hidden[0], hidden[1], dim=-1))
    assert block_influence(module, calibration)[0] == pytest.approx(float(torch.cat(states).mean()), rel=1e-5)


def test_hooks_are_gone_even_when_the_model_fails(subject: Subjects) -> None:
    module = subject().module
    with pytest.raises(ValueError, match="input_ids"):
        block_influence(module, Calibration(({"no_such_input": torch.zeros(1)},)))
    assert not any(block._forward_hooks for block in blocks(module)[1])


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_lists_with_one_entry_a_block_are_shortened_with_it(family: str) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": kinds,
        "eos_token_id": [1, 2, 3, 4],
    }
    config = Qwen2Config(**sizes) if family == "qwen2" else Gemma3TextConfig(**sizes, head_dim=16, sliding_window=8)
    module = DropLayers(layers=(1, 2)).apply(AutoModelForCausalLM.from_config(config))
    assert module.config.layer_types == ["sliding_attention", "full_attention"]
    assert module.config.num_hidden_layers == 2
    assert module.config.eos_token_id == [1, 2, 3, 4]


def test_the_cache_fits_the_shorter_model(
    subject: Subjects, ids: Tensor, greedy: Callable[[Subject, Tensor, int], tuple[Tensor, Tensor]]
) -> None:
    shorter = DropLayers(layers=(0, 2)).apply(subject(num_hidden_layers=4))
    positions = [block.self_attn.layer_idx for block in blocks(shorter.module)[1]]  # type: ignore[union-attr]
    assert positions == [0, 1]
    by_engine, by_full_forwards = greedy(shorter, ids, 6)
    assert torch.equal(by_engine, by_full_forwards)


def test_two_equally_long_lists_of_blocks_are_refused() -> None:
    def stack() -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    both = nn.ModuleDict({"encoder": stack(), "decoder": stack()})
    with pytest.raises(TransformError, match="several lists of 2 blocks: encoder, decoder"):
        DropLayers(layers=(0,)).apply(both)


def test_a_list_within_a_block_is_not_taken_for_the_depth() -> None:
    inner = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])}) for _ in range(3)]
    assert blocks(nn.ModuleDict({"layers": nn.ModuleList(inner)}))[0] == "layers"


def test_by_the_loss_those_blocks_go_without_which_the_text_is_predicted_best(subject: Subjects) -> None:
    data = Calibration(tuple({"input_ids": torch.randint(2, 96, (4, 16))} for _ in range(2)))
    whole = subject(num_hidden_layers=4).module

    def loss_without(*doomed: int) -> float:
        short = drop(copy.deepcopy(whole), set(doomed))
        with torch.no_grad():
            return sum(float(next_token_loss(short, short(**batch), batch)) for batch in data.batches)

    first = min(range(4), key=loss_without)
    second = min((i for i in range(4) if i != first), key=lambda i: loss_without(first, i))
    expected = drop(copy.deepcopy(whole), {first, second}).state_dict()
    found = DropLayers(count=2, importance="loss").apply(copy.deepcopy(whole), data)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert found.config.num_hidden_layers == 2  # type: ignore[union-attr]
