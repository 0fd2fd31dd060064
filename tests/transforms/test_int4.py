"""Four bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.transforms import Int4, Plan

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


@pytest.mark.parametrize("group_size", [32, 64])
def test_no_layer_is_off_by_more_than_plain_rounding_would_be(subject: Subjects, group_size: Any) -> None:
    dense = subject(3).module
    packed = Int4(group_size=group_size).apply(subject(3)).module
    for name, layer in dense.named_modules():
        other = packed.get_submodule(name)
        if isinstance(other, Int4Linear):
            weight = layer.weight.detach()
            groups = weight.view(weight.shape[0], -1, group_size)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            plain = (step / 2).expand_as(groups).square().sum() / 3
            assert (other.weight - weight).square().sum() < plain * 1.25


def test_the_answers_are_those_of_a_dense_model_with_the_rounded_weights(subject: Subjects, logits: Logits) -> None:
    packed, dense = Int4(group_size=32).apply(subject(3)).module, subject(3).module
    exact = logits(dense)
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(packed.get_submodule(name).weight)  # type: ignore[arg-type]
    rounded, answers = logits(dense), logits(packed)
    assert (answers - rounded).norm() < 0.03 * rounded.norm()  # kernels may round activations to bfloat16
    assert 0.01 * exact.norm() < (answers - exact).norm() < 0.6 * exact.norm()  # random weights have nothing to round on


def test_a_head_is_int8_unless_int4_is_wanted(subject: Subjects) -> None:
    heads = [Int4(head=head).apply(subject(tie_word_embeddings=False)).module.get_submodule("lm_head") for head in ("int8", "int4")]
    assert [type(head) for head in heads] == [Int8Linear, Int4Linear]


def test_a_tied_head_is_always_int8_and_stays_tied(subject: Subjects, tmp_path: Path, logits: Logits) -> None:
    packed = Int4(head="int4").apply(subject())
    optkit.save(packed, tmp_path / "packed")
    again = optkit.load(tmp_path / "packed")
    for module in (packed.module, again.module):
        embedding, head = module.get_submodule("model.embed_tokens"), module.get_submodule("lm_head")
        assert isinstance(embedding, Int8Embedding)
        assert isinstance(head, Int8Linear)
        assert head.tied is embedding
    assert torch.equal(logits(again.module), logits(packed.module))


def test_a_group_size_that_does_not_divide_is_refused_with_the_numbers_and_one_that_fits(subject: Subjects) -> None:
    whole = subject(intermediate_size=160)
    words = r"group_size 64 does not divide in_features 160 of model.layers.0.mlp.down_proj \(3 of 22 layers\); use group_size 32$"
    with pytest.raises(TransformError, match=words):
        Int4(group_size=64).check(Plan(whole))
    with pytest.raises(TransformError, match=r"group_size 64 does not divide in_features 160"):
        Int4(group_size=64).apply(whole)
    assert isinstance(whole.module.get_submodule("model.layers.0.self_attn.q_proj"), nn.Linear)
    assert not isinstance(whole.module.get_submodule("model.layers.0.self_attn.q_proj"), Int4Linear)
    Int4(group_size=32).check(Plan(whole))


def test_where_no_group_size_fits_the_layer_is_to_be_excluded(subject: Subjects) -> None:
    whole = subject(intermediate_size=100)
    with pytest.raises(TransformError, match=r"exclude such layers: targets: \{exclude: \['model.layers.0.mlp.down_proj'\]\}"):
        Int4().check(Plan(whole))
    packed = Int4(targets=Targets(exclude=("down_proj",))).apply(whole).module
    assert type(packed.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def test_an_odd_head_in_int8_needs_no_group(subject: Subjects) -> None:
    whole = subject(tie_word_embeddings=False)
    whole.module.lm_head = nn.Linear(100, 96)
    Int4().check(Plan(whole))
    with pytest.raises(TransformError, match=r"in_features 100 of lm_head"):
        Int4(head="int4").check(Plan(whole))


def test_a_bare_layer_of_odd_width_is_refused() -> None:
    with pytest.raises(TransformError, match=r"does not divide in_features 96 of Linear .*use group_size 32"):
        Int4().apply(nn.Linear(96, 8))


def test_conv1d_of_gpt2_is_turned_before_it_is_grouped(logits: Logits) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_layer=2, n_embd=64, n_head=4, n_positions=64, initializer_range=0.2)).eval()  # type: ignore[no-any-return]

    packed = Int4(group_size=32).apply(build())
    layer = packed.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, Int4Linear)
    assert (layer.in_features, layer.out_features) == (64, 192)
    dense = logits(build())
    assert (logits(packed) - dense).norm() / dense.norm() < 0.3


def test_the_artefact_is_less_than_a_fifth_of_float32(subject: Subjects, tmp_path: Path) -> None:
    optkit.save(subject(hidden_size=128, intermediate_size=512), tmp_path / "dense")
    optkit.save(Int4().apply(subject(hidden_size=128, intermediate_size=512)), tmp_path / "packed")
    sizes = [(tmp_path / name / f"{file}.safetensors").stat().st_size for name, file in (("packed", "packed"), ("dense", "model"))]
    assert sizes[0] / sizes[1] < 0.2


def test_a_tied_head_of_odd_width_needs_no_group_because_it_becomes_int8() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 48), "hidden": nn.Linear(64, 8), "head": nn.Linear(48, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    packed = Int4(head="int4").apply(model)
    assert isinstance(packed.get_submodule("head"), Int8Linear)
    assert isinstance(packed.get_submodule("hidden"), Int4Linear)


def test_a_preview_searches_for_no_scales(subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object) -> None:
        raise AssertionError("a search on the meta device takes minutes for a large model and finds nothing")

    monkeypatch.setattr("optkit.kernels.int4.quantize_groups", search)
    with torch.device("meta"):
        assert isinstance(Int4().preview(subject()).module.get_submodule("model.layers.0.mlp.up_proj"), Int4Linear)
