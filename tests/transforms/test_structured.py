"""prune_ffn and prune_heads: what goes, what makes good for it, and that the narrower model is the old one without it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms import Plan, PruneFfn, PruneHeads
from optkit.transforms.prune.dimensions import Place, Segment
from optkit.transforms.prune.importance import by_units
from optkit.transforms.prune.structured import rounded, shares

Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]
ALONE: dict[str, Any] = {"importance": "magnitude", "compensation": "none"}


@pytest.fixture
def data() -> Calibration:
    draw = torch.Generator().manual_seed(3)
    return Calibration(tuple({"input_ids": torch.randint(2, 96, (4, 24), generator=draw)} for _ in range(3)))


def layer_of(module: nn.Module, block: int, name: str) -> nn.Linear:
    layer = module.get_submodule(f"model.layers.{block}.{name}")
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def quieten(module: nn.Module, name: str, columns: slice, factor: float = 0.0) -> None:
    for block in range(3):
        layer_of(module, block, name).weight[:, columns] *= factor


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("compensation", ["weights", "none"])
def test_feed_forward_units_that_nobody_hears_go_first_and_nothing_changes(
    tiny_llama: Llama, logits: Logits, data: Calibration, importance: Any, compensation: Any
) -> None:
    module = tiny_llama()
    quieten(module, "mlp.down_proj", slice(32, 64))
    before = logits(module)
    narrower = PruneFfn(ratio=0.25, multiple=32, importance=importance, compensation=compensation).apply(module, data)
    assert narrower.config.intermediate_size == 96  # type: ignore[union-attr]
    assert tuple(layer_of(narrower, 1, "mlp.gate_proj").weight.shape) == (96, 64)
    assert layer_of(narrower, 1, "mlp.down_proj").in_features == 96
    assert near(logits(narrower), before)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_a_group_of_heads_that_nobody_hears_goes_first_and_nothing_changes(
    tiny_llama: Llama, logits: Logits, data: Calibration, importance: Any
) -> None:
    module = tiny_llama()
    quieten(module, "self_attn.o_proj", slice(0, 32))
    before = logits(module)
    narrower = PruneHeads(ratio=0.5, importance=importance).apply(module, data)
    config: Any = narrower.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert tuple(layer_of(narrower, 0, "self_attn.k_proj").weight.shape) == (16, 64)
    assert tuple(layer_of(narrower, 2, "self_attn.o_proj").weight.shape) == (64, 32)
    assert near(logits(narrower), before)


def test_the_smallest_weights_go_by_magnitude_and_the_rest_is_as_it_was(tiny_llama: Llama, logits: Logits) -> None:
    module = tiny_llama()
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        for block in range(3):
            with torch.no_grad():
                layer_of(module, block, name).weight[64:] *= 0.1
    quieten(module, "mlp.down_proj", slice(64, 128), 0.1)
    kept = {name: layer_of(module, 0, f"mlp.{name}").weight.detach().clone() for name in ("gate_proj", "down_proj")}
    narrower = PruneFfn(ratio=0.5, **ALONE).apply(deepcopy(module))
    assert torch.equal(layer_of(narrower, 0, "mlp.gate_proj").weight, kept["gate_proj"][:64])
    assert torch.equal(layer_of(narrower, 0, "mlp.down_proj").weight, kept["down_proj"][:, :64])


def test_a_unit_that_says_the_same_as_another_is_made_good_by_it(tiny_llama: Llama, logits: Logits, data: Calibration) -> None:
    module = tiny_llama()
    with torch.no_grad():
        for block in range(3):
            for name in ("mlp.gate_proj", "mlp.up_proj"):
                weight = layer_of(module, block, name).weight
                weight[96:] = weight[:32]
            layer_of(module, block, "mlp.down_proj").weight[:, 96:] *= 0.2  # so that the copies go, and are missed
    before = logits(module)
    lost, made_good = (
        logits(PruneFfn(ratio=0.25, multiple=32, compensation=compensation).apply(deepcopy(module), data))
        for compensation in ("none", "weights")
    )
    assert (made_good - before).norm() < 0.5 * (lost - before).norm()


def test_a_unit_that_always_says_the_same_is_made_good_by_a_bias(logits: Logits, data: Calibration) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=64, init_std=0.2,
    )  # fmt: skip
    module = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for block in module.model.decoder.layers:
            block.fc1.weight[:64] = 0
            block.fc1.bias[:64] = 0.2
            block.fc2.weight[:, :64] *= 0.2
    before = logits(module)
    settings: dict[str, Any] = {"ratio": 0.5, "importance": "activation"}
    lost = logits(PruneFfn(compensation="none", **settings).apply(deepcopy(module), data))
    made_good = logits(PruneFfn(compensation="bias", **settings).apply(deepcopy(module), data))
    assert not near(lost, before, 1e-3)
    assert near(made_good, before, 1e-5)


def test_a_bias_that_is_not_there_cannot_make_good(tiny_llama: Llama) -> None:
    with pytest.raises(TransformError, match=r"mlp.down_proj has no bias .*; use compensation: weights"):
        PruneFfn(ratio=0.5, compensation="bias").check(Plan(Subject(tiny_llama(), "tiny")))


@pytest.mark.parametrize("hidden", [48, 96])
def test_the_shares_are_those_of_least_squares(hidden: int) -> None:
    x = torch.randn(500, hidden, dtype=torch.float64) @ torch.randn(hidden, hidden, dtype=torch.float64)
    stay, go = torch.arange(0, hidden, 2), torch.arange(1, hidden, 2)
    gram = x.T @ x / len(x)
    lift = 1e-3 * gram.diagonal().mean() + 1e-12
    expected = torch.linalg.solve(gram[stay][:, stay] + lift * torch.eye(len(stay), dtype=torch.float64), gram[stay][:, go]).T
    torch.testing.assert_close(shares(gram, stay, go), expected)


@pytest.mark.parametrize(
    ("units", "ratio", "multiple", "expected"),
    [
        (1024, 0.25, 64, 768),
        (1024, 0.5, 64, 512),
        (1000, 0.1, 64, 896),
        (4, 0.25, 1, 3),
        (9, 0.3, 1, 6),
        (128, 0.9, 64, None),
        (3, 0.1, 1, None),
    ],
)
def test_what_stays_is_the_nearest_multiple_or_refused(units: int, ratio: float, multiple: int, expected: int) -> None:
    if expected:
        assert rounded(units, ratio, multiple, "units") == expected
    else:
        with pytest.raises(TransformError, match=f"ratio {ratio} of {units} units leaves .*; use ratio "):
            rounded(units, ratio, multiple, "units")


def test_a_quarter_of_two_groups_is_refused_with_the_ratio_that_would_do(tiny_llama: Llama) -> None:
    with pytest.raises(TransformError, match=r"ratio 0.25 of 2 groups of heads leaves 2 at multiples of 1; use ratio 0.5"):
        PruneHeads().check(Plan(Subject(tiny_llama(), "tiny")))
    with pytest.raises(TransformError, match=r"ratio 0.5 of 1 groups of heads leaves 0.*leave this step out"):
        PruneHeads(ratio=0.5).check(Plan(Subject(tiny_llama(num_key_value_heads=1), "tiny")))


def test_every_head_is_a_group_where_none_share_their_keys(tiny_llama: Llama, logits: Logits, data: Calibration) -> None:
    module = tiny_llama(num_key_value_heads=4)
    quieten(module, "self_attn.o_proj", slice(16, 32))
    before = logits(module)
    narrower = PruneHeads(ratio=0.25).apply(module, data)
    config: Any = narrower.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (3, 3)
    assert near(logits(narrower), before)


def test_without_data_only_weights_can_judge(tiny_llama: Llama) -> None:
    with pytest.raises(
        TransformError, match="prune_ffn needs calibration data; give some, or use importance: magnitude, compensation: none"
    ):
        PruneFfn(ratio=0.5).apply(tiny_llama())


def test_the_entries_of_units_follow_the_segments() -> None:
    place = Place("layer", "weight", False, 0, (Segment(0, 3), Segment(12, 1)))  # four units of three, then of one
    assert place.entries(torch.tensor([1, 3])).tolist() == [3, 4, 5, 9, 10, 11, 13, 15]
    assert by_units(torch.arange(16.0), place, 4).tolist() == [0 + 1 + 2 + 12, 3 + 4 + 5 + 13, 6 + 7 + 8 + 14, 9 + 10 + 11 + 15]


def test_what_no_configuration_describes_is_refused(mlp: Callable[[], nn.Module]) -> None:
    with pytest.raises(TransformError, match="Sequential is no model of transformers"):
        PruneFfn(**ALONE).apply(mlp())


def test_an_encoder_spread_over_modules_is_pruned_too(data: Calibration) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    module = BertModel(BertConfig(**sizes, max_position_embeddings=64)).eval()
    narrower = PruneFfn(ratio=0.5).apply(module, data)
    assert narrower.config.intermediate_size == 64
    assert tuple(narrower.encoder.layer[1].output.dense.weight.shape) == (64, 64)
    with pytest.raises(TransformError, match="BertModel cannot have fewer groups of heads"):
        PruneHeads(ratio=0.5).apply(module, data)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_may_keep_different_widths_and_open_again(
    tiny_llama: Llama, logits: Logits, data: Calibration, tmp_path: Path, architecture: str
) -> None:
    if architecture == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        module: Any = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64, n_inner=128)).eval()
        readers = [block.mlp.c_proj for block in module.transformer.h]
        readers[0].weight.data[32:] = 0
    else:
        module = tiny_llama()
        readers = [layer_of(module, block, "mlp.down_proj") for block in range(3)]
        readers[0].weight.data[:, 32:] = 0
    before = logits(module)
    step = PruneFfn(ratio=0.25, multiple=32, uniform=False, compensation="none")
    pruned = step.apply(Subject(module, "tiny"), data)
    widths = [layer.nx if architecture == "gpt2" else layer.in_features for layer in readers]
    assert widths == [32, 128, 128]
    assert near(logits(pruned.module), before)
    assert pruned.opens_in == "optkit"
    optkit.save(pruned, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    assert torch.equal(logits(again.module), logits(pruned.module))
