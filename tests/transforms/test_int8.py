"""Eight bits a weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.transforms import Int4, Int8, Plan, Transform
from optkit.transforms.quantize import packing

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


def test_no_weight_is_off_by_more_than_half_a_step(subject: Subjects) -> None:
    dense = subject(3).module
    packed = Int8().apply(subject(3)).module
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear):
            other = packed.get_submodule(name)
            assert isinstance(other, Int8Linear)
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            assert ((layer.weight - other.weight).abs() <= step * 0.5001).all()


def test_the_answers_are_those_of_a_dense_model_with_the_rounded_weights(subject: Subjects, logits: Logits) -> None:
    packed, dense = Int8().apply(subject(3)).module, subject(3).module
    exact = logits(dense)
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(packed.get_submodule(name).weight)  # type: ignore[arg-type]
    rounded, answers = logits(dense), logits(packed)
    assert (answers - rounded).norm() < 0.03 * rounded.norm()  # kernels may round activations to bfloat16
    assert 1e-3 * exact.norm() < (answers - exact).norm() < 0.1 * exact.norm()


def test_a_tied_embedding_stays_tied_in_one_storage_and_is_saved_once(subject: Subjects, tmp_path: Path) -> None:
    packed = Int8().apply(subject())
    optkit.save(packed, tmp_path / "packed")
    for module in (packed.module, optkit.load(tmp_path / "packed").module):
        embedding, head = module.get_submodule("model.embed_tokens"), module.get_submodule("lm_head")
        assert isinstance(embedding, Int8Embedding)
        assert isinstance(head, Int8Linear)
        assert head.tied is embedding
    saved = load_file(tmp_path / "packed" / "packed.safetensors")
    assert not any(name.startswith("lm_head") for name in saved)
    assert saved["model.embed_tokens.qweight"].shape == (96, 64)


def test_an_untied_head_is_packed_alone(subject: Subjects) -> None:
    module = Int8().apply(subject(tie_word_embeddings=False)).module
    assert type(module.get_submodule("model.embed_tokens")) is nn.Embedding
    assert isinstance(module.get_submodule("lm_head"), Int8Linear)


def test_a_tied_head_that_is_excluded_stays_with_its_embedding(subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    packed = Int8(targets=Targets(exclude=("lm_head",))).apply(subject())
    optkit.save(packed, tmp_path / "packed")
    again = optkit.load(tmp_path / "packed").module
    assert again.lm_head.weight is again.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(logits(again), logits(packed.module))


def test_the_artefact_is_about_a_quarter_of_float32(subject: Subjects, tmp_path: Path) -> None:
    optkit.save(subject(hidden_size=128, intermediate_size=512), tmp_path / "dense")
    optkit.save(Int8().apply(subject(hidden_size=128, intermediate_size=512)), tmp_path / "packed")
    sizes = [(tmp_path / name / f"{file}.safetensors").stat().st_size for name, file in (("packed", "packed"), ("dense", "model"))]
    assert sizes[0] / sizes[1] < 0.3


def test_conv1d_of_gpt2_is_turned_and_packed(logits: Logits) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_layer=2, n_embd=64, n_head=4, n_positions=64, initializer_range=0.2)).eval()  # type: ignore[no-any-return]

    packed = Int8().apply(build())
    layer = packed.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(layer, Int8Linear)
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert layer.bias is not None
    dense = logits(build())
    assert (logits(packed) - dense).norm() / dense.norm() < 0.1


def test_biases_stay_as_they_are(subject: Subjects) -> None:
    whole = subject(attention_bias=True)
    with torch.no_grad():
        whole.module.get_submodule("model.layers.0.self_attn.q_proj").bias.normal_()  # type: ignore[operator]
    before = whole.module.get_submodule("model.layers.0.self_attn.q_proj").bias.clone()  # type: ignore[operator]
    packed = Int8().apply(whole).module
    assert torch.equal(packed.get_submodule("model.layers.0.self_attn.q_proj").bias, before)  # type: ignore[arg-type]


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config).eval()  # type: ignore[no-any-return]


def test_fused_experts_are_refused_by_name_and_left_alone_when_excluded() -> None:
    words = r"int8 cannot reach 2 layers .*\(8\d% of all parameters\), such as model.layers.0.mlp.experts .*exclude: \['\*.experts'\]"
    with pytest.raises(TransformError, match=words):
        Int8().check(Plan(Subject(mixtral(), "mixtral")))
    packed = Int8(targets=Targets(exclude=("*.experts",))).apply(mixtral())
    assert isinstance(packed.get_submodule("model.layers.0.self_attn.q_proj"), Int8Linear)
    assert type(packed.get_submodule("model.layers.0.mlp.experts")).__name__ == "MixtralExperts"


def test_many_small_holders_of_weights_are_not_overlooked() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(4, 4))

    model = nn.ModuleDict({f"h{number}": Holder() for number in range(200)} | {"linear": nn.Linear(32, 32)})
    with pytest.raises(TransformError, match=r"cannot reach 200 layers"):
        Int8().apply(model)


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2)
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()  # type: ignore[no-any-return]


def test_an_embedding_that_scales_its_rows_is_packed_with_its_multiplier(logits: Logits, ids: Tensor) -> None:
    dense, packed = gemma(), Int8().apply(gemma())
    embedding: Any = packed.model.embed_tokens  # type: ignore[union-attr]
    assert (embedding.multiplier, packed.lm_head.tied) == (8, embedding)  # type: ignore[union-attr]
    exact = dense.model.embed_tokens(ids)  # type: ignore[union-attr,operator]
    assert (embedding(ids) - exact).abs().max() <= 8 * 0.501 * embedding.scale.max()
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(packed.get_submodule(name).weight)  # type: ignore[arg-type]
    rounded = logits(dense)
    assert (logits(packed) - rounded).norm() < 0.03 * rounded.norm()
    excluded = Int8(targets=Targets(exclude=("lm_head",))).apply(gemma())
    assert excluded.lm_head.weight is excluded.model.embed_tokens.weight  # type: ignore[union-attr]


def test_an_embedding_that_computes_more_than_a_product_is_refused_by_name() -> None:
    class Shifted(nn.Embedding):
        embed_scale = 2.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale + 1

    model = nn.ModuleDict({"embed": Shifted(20, 32), "head": nn.Linear(32, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    words = r"int8 cannot pack head: it shares its weight with embed, and Shifted computes more than .*exclude: \['head'\]"
    with pytest.raises(TransformError, match=words):
        Int8().apply(model)


def test_embeddings_that_share_a_weight_and_scale_it_differently_are_refused_by_name() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    model = nn.ModuleDict({"one": nn.Embedding(20, 32), "two": BartScaledWordEmbedding(20, 32, 0, 3.0), "head": nn.Linear(32, 20)})
    model["two"].weight = model["head"].weight = model["one"].weight
    with pytest.raises(TransformError, match=r"shares its weight with two, .* times the same number; .*exclude: \['head'\]"):
        Int8().apply(model)


def test_weights_that_are_no_numbers_are_refused_with_the_layer(mlp: Callable[[], nn.Module]) -> None:
    module = mlp()
    with torch.no_grad():
        module.get_submodule("2").weight[3, 0] = float("nan")  # type: ignore[operator]
    with pytest.raises(TransformError, match=r"^2: the weight holds NaN or infinity in 1 of 64 rows, first in row 3"):
        Int8().apply(module)


def test_packing_twice_finds_nothing_left(subject: Subjects) -> None:
    with pytest.raises(TargetError, match=r"there is no layer to change: .*packed already"):
        Int8().apply(Int8().apply(subject()))


def test_gradients_reach_the_input_through_a_packed_layer(mlp: Callable[[], nn.Module]) -> None:
    module = Int8().apply(mlp())
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [Int8(), Int8(activations="dynamic"), Int4(group_size=32)], ids=lambda change: repr(change)[:30])
def test_each_float_weight_goes_when_its_layer_is_packed(subject: Subjects, monkeypatch: pytest.MonkeyPatch, change: Transform) -> None:
    module = subject(tie_word_embeddings=False).module
    floats = [weakref.ref(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)]
    alive: list[int] = []
    replace_layer = packing.replace_layer

    def counting(*arguments: Any) -> None:
        alive.append(sum(weight() is not None for weight in floats))
        replace_layer(*arguments)

    monkeypatch.setattr(packing, "replace_layer", counting)
    packed = change.apply(module)
    assert alive[0] == len(floats) and alive[-1] <= 2, alive
    del packed
