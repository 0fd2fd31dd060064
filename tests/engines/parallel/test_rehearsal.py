"""Parts of a model answer together as the whole does: every architecture, packed or not, in shards, in stages, and in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.engines.parallel import plan
from optkit.engines.parallel.cut import part_of
from optkit.engines.parallel.part import Part
from optkit.engines.parallel.rehearsal import rehearse
from optkit.kernels.packed import PackedLayer
from optkit.transforms import Dtype, Int4, Int8, LowRank, PruneFfn, PruneHeads, Transform

SIZES = {"vocab_size": 97, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "mistral": GROUPED,
    "gemma3_text": {**GROUPED, "head_dim": 16},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "gpt2": {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {**SIZES, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 32},
    "gpt_neox": {**SIZES, "hidden_size": 64, "intermediate_size": 128},
    "bloom": {"vocab_size": 97, "hidden_size": 64, "n_layer": 3, "n_head": 4},
}
MESHES = [Mesh(tensor=2), Mesh(pipeline=3), Mesh(pipeline=2, tensor=2)]
Build = Callable[..., nn.Module]


@pytest.fixture
def build() -> Build:
    def make(name: str, **changes: Any) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        module: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**CONFIGURATIONS[name], **changes})).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
        return module

    return make


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("transform", [None, Int8(), Int4(group_size=32)], ids=["floats", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_parts_of_every_architecture_answer_like_the_whole(name: str, transform: Transform | None, mesh: Mesh, build: Build) -> None:
    module = build(name)
    module = module if transform is None else transform.apply(module)
    assert rehearse(module, mesh) < (1e-5 if transform is None else 0.01)


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        Dtype(dtype="bfloat16"),
        Int8(embedding=True),
        LowRank(method="plain"),
        PruneFfn(ratio=0.5, multiple=32, importance="magnitude", compensation="none"),
    ],
    ids=lambda transform: transform.step().name,
)
def test_what_other_steps_have_made_of_a_model_can_be_shared(transform: Transform, mesh: Mesh, build: Build) -> None:
    rehearse(transform.apply(build("llama")), mesh)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_stages_keep_half_precision_where_positions_were_added_before(name: str, build: Build) -> None:
    rehearse(build(name).bfloat16(), Mesh(pipeline=3))


def test_a_model_with_fewer_heads_is_shared_by_those_left(build: Build) -> None:
    fewer = PruneHeads(ratio=0.5, importance="magnitude", compensation="none").apply(build("llama", num_key_value_heads=4))
    assert rehearse(fewer, Mesh(tensor=2)) < 1e-5


def test_a_shard_holds_half_and_keeps_the_kinds_of_its_layers(build: Build) -> None:
    module = Int4(group_size=32).apply(build("llama", tie_word_embeddings=False))
    whole = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    shard = part_of(module, Part(Mesh(tensor=2), Mesh(tensor=2).place(1)))
    half = sum(tensor.numel() * tensor.element_size() for tensor in shard.state_dict().values())
    assert half < 0.55 * whole
    kinds = {type(layer) for layer in module.modules() if isinstance(layer, PackedLayer)}
    assert {type(layer) for layer in shard.modules() if isinstance(layer, PackedLayer)} == kinds


def test_a_stage_has_its_blocks_alone(build: Build) -> None:
    mesh = Mesh(pipeline=2)
    stages = [part_of(build("gpt2"), Part(mesh, mesh.place(rank), stages=(1, 2))) for rank in range(2)]
    assert [stage.config.num_hidden_layers for stage in stages] == [1, 2]
    assert isinstance(stages[0].lm_head, nn.Identity)
    assert [type(stages[1].transformer.h[index].attn.layer_idx) for index in range(2)] == [int, int]
    assert stages[1].lm_head.weight is stages[1].transformer.wte.weight  # tied still, and held by the last stage too


def test_a_plan_that_overlooks_something_is_refused_and_not_served(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan._THREE_IN_ONE, "c_attn", 1)
    monkeypatch.setattr(plan, "_COUNTS", {"gpt2": ("num_heads", "split_size", "embed_dim")})
    with pytest.raises(TransformError, match="answers otherwise in 2 parts than as a whole"):
        rehearse(build("gpt2"), Mesh(tensor=2))


def test_an_architecture_without_a_plan_is_named(build: Build) -> None:
    module = build("llama")
    module.config.model_type, module.config.base_model_tp_plan = "novel", None
    with pytest.raises(TransformError, match="no plan says how the layers of a novel are shared by several processes"):
        rehearse(module, Mesh(tensor=2))
