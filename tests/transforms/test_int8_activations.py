"""Eight bits on both sides of the product, and input embeddings of eight bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import OptkitError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.models.sources import outline_model
from optkit.transforms import Int4, Int8, Plan

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]
ACTIVATIONS = pytest.mark.parametrize("activations", ["dynamic", "static"])
UNTIED = {"tie_word_embeddings": False}


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def error_of(packed: nn.Module, dense: nn.Module, logits: Logits) -> float:
    exact = logits(dense)
    return float((logits(packed) - exact).norm() / exact.norm())


@ACTIVATIONS
def test_every_layer_but_the_head_rounds_its_input(subject: Subjects, calibration: Calibration, logits: Logits, activations: Any) -> None:
    for tied in (True, False):
        packed = Int8(activations=activations).apply(subject(3, tie_word_embeddings=tied), calibration).module
        layers = linears(packed)
        assert isinstance(layers.pop("lm_head"), Int8Linear)
        assert all(isinstance(layer, W8A8Linear) and layer.static == (activations == "static") for layer in layers.values())
        assert len(layers) == 21
        dense = subject(3, tie_word_embeddings=tied).module
        weight_only = error_of(Int8().apply(subject(3, tie_word_embeddings=tied)).module, dense, logits)
        assert weight_only < error_of(packed, dense, logits) < 0.2


@ACTIVATIONS
def test_saved_and_opened_again_the_answers_are_equal(
    subject: Subjects, calibration: Calibration, logits: Logits, tmp_path: Path, activations: Any
) -> None:
    whole = Int8(activations=activations, embedding=True).apply(subject(**UNTIED), calibration)
    optkit.save(whole, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    assert torch.equal(logits(again.module), logits(whole.module))
    assert outline_model(str(tmp_path / "saved")).history == again.history == whole.history
    saved = load_file(tmp_path / "saved" / "packed.safetensors")
    name = "model.layers.0.mlp.down_proj.input_scale"
    assert (name in saved) == (activations == "static")
    assert activations == "dynamic" or (saved[name].shape == (1,) and saved[name].dtype == torch.float32)


@ACTIVATIONS
def test_shapes_are_foretold_without_data(subject: Subjects, calibration: Calibration, activations: Any) -> None:
    step = Int8(activations=activations, embedding=True)
    with torch.device("meta"):
        outline = subject(**UNTIED)
        step.check(Plan(outline))
        foretold = step.preview(outline).module.state_dict()
    real = step.apply(subject(**UNTIED), calibration).module.state_dict()
    assert {name: tensor.shape for name, tensor in foretold.items()} == {name: tensor.shape for name, tensor in real.items()}


def test_only_static_activations_need_data_and_say_so(subject: Subjects) -> None:
    assert Int8(activations="static").needs_data
    assert not Int8(activations="dynamic").needs_data and not Int8().needs_data
    with pytest.raises(TransformError, match="int8 with static activations needs calibration data"):
        Int8(activations="static").apply(subject())


def test_static_scales_are_those_of_each_layer_on_the_untouched_model(subject: Subjects, calibration: Calibration) -> None:
    dense = subject(3).module
    seen: list[Tensor] = []
    dense.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        for batch in calibration.batches:
            dense(**batch)
    packed = Int8(activations="static").apply(subject(3), calibration).module
    layer = packed.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, W8A8Linear)
    most = float(torch.stack(seen).max())
    assert 0.1 * most <= float(layer.tensors()[2]) * 127 <= most * 1.001


@ACTIVATIONS
def test_a_head_of_its_own_takes_part_when_asked(subject: Subjects, calibration: Calibration, activations: Any) -> None:
    packed = Int8(activations=activations, head="w8a8").apply(subject(**UNTIED), calibration).module
    assert isinstance(packed.get_submodule("lm_head"), W8A8Linear)


def test_a_head_that_cannot_take_part_is_refused(subject: Subjects) -> None:
    with pytest.raises(ValueError, match="activations: none rounds no input; set activations to dynamic"):
        Int8(head="w8a8")
    both = Int8(activations="dynamic", head="w8a8")
    with pytest.raises(TransformError, match="head: w8a8 has no effect: the head is tied to the embedding and keeps float inputs"):
        both.check(Plan(subject()))
    spared = both.model_copy(update={"targets": Targets(exclude=("lm_head",))})
    with pytest.raises(TransformError, match="the head is not among the layers to quantize"):
        spared.check(Plan(subject(**UNTIED)))


def test_bare_modules_and_layers_are_packed(mlp: Callable[[], nn.Module]) -> None:
    data = Calibration(({"input": torch.randn(8, 64)},))
    x = torch.randn(5, 64)
    for activations in ("dynamic", "static"):
        module, dense = Int8(activations=activations).apply(mlp(), data), mlp()  # type: ignore[arg-type]
        assert all(isinstance(module.get_submodule(name), W8A8Linear) for name in "024")
        assert module(x).shape == dense(x).shape
        layer = nn.Linear(64, 32)
        expected = layer(x)
        packed = Int8(activations=activations).apply(layer, data)  # type: ignore[arg-type]
        assert isinstance(packed, W8A8Linear)
        assert (packed(x) - expected).norm() < 0.03 * expected.norm()


def test_conv1d_of_gpt2_is_turned_and_packed(calibration: Calibration, logits: Logits) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_layer=2, n_embd=64, n_head=4, n_positions=64, initializer_range=0.2)).eval()  # type: ignore[no-any-return]

    packed = Int8(activations="static").apply(build(), calibration)
    layer = packed.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(layer, W8A8Linear)
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert error_of(packed, build(), logits) < 0.15


@pytest.mark.parametrize("transform", [Int8(embedding=True), Int4(group_size=32, embedding=True)], ids=["int8", "int4"])
def test_an_untied_embedding_is_packed_on_request_and_the_artefact_shrinks(transform: Any, subject: Subjects, tmp_path: Path) -> None:
    packed = transform.apply(subject(**UNTIED))
    embedding = packed.module.get_submodule("model.embed_tokens")
    assert isinstance(embedding, Int8Embedding)
    dense = subject(**UNTIED).module.get_submodule("model.embed_tokens").weight.detach()  # type: ignore[operator,union-attr]
    assert (embedding.weight - dense).abs().max() <= 0.5001 * float(dense.abs().max()) / 127  # type: ignore[operator]
    without = transform.model_copy(update={"embedding": False}).apply(subject(**UNTIED))
    assert type(without.module.get_submodule("model.embed_tokens")) is nn.Embedding
    for name, whole in (("with", packed), ("without", without)):
        optkit.save(whole, tmp_path / name)
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / name / "packed.safetensors").values()) for name in ("with", "without")]
    assert sizes[1] - sizes[0] == 96 * 64 * 3 - 96 * 4  # a byte for four, and a scale a row


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_a_tied_embedding_goes_with_its_head_whether_asked_or_not(kind: Any, subject: Subjects) -> None:
    for embedding in (False, True):
        packed = kind(embedding=embedding).apply(subject()).module
        head = packed.get_submodule("lm_head")
        assert isinstance(head, Int8Linear) and head.tied is packed.get_submodule("model.embed_tokens")


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_an_embedding_that_cannot_be_packed_is_refused_before_anything_changes(
    kind: Any, subject: Subjects, mlp: Callable[[], nn.Module]
) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8

    with pytest.raises(TransformError, match="embedding: Sequential has no input embedding to pack"):
        kind(embedding=True).apply(mlp())
    with pytest.raises(TransformError, match=r"embedding: model.embed_tokens shares its weight with lm_head, which targets exclude"):
        kind(embedding=True, targets=Targets(exclude=("lm_head",))).check(Plan(subject()))
    whole = subject(**UNTIED)
    whole.module.set_input_embeddings(Scaled(96, 64))  # type: ignore[operator]
    with pytest.raises(OptkitError, match=r"cannot pack model.embed_tokens: Scaled computes more than a look-up"):
        kind(embedding=True).check(Plan(whole))
