"""The int4 methods as transforms: on language models, encoders and bare modules, with data and without."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import optkit
from optkit.core.errors import OptkitWarning, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.transforms import Int4, Plan
from optkit.transforms.layers import weight_of

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]
METHODS = ["rtn", "hqq", "awq", "gptq"]
CELLS = [(method, size, even) for method in METHODS for size in (32, "channel") for even in (False, True) if not (method == "hqq" and even)]


def int4(**settings: Any) -> Int4:
    return Int4(**{"group_size": 32, **settings})


def output_errors(module: nn.Module, dense: nn.Module, data: Calibration) -> dict[str, float]:
    """Return for each packed layer the squared error of its outputs, on the inputs that it gets in the dense model."""
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            off = nn.functional.linear(args[0], module.get_submodule(name).weight) - nn.functional.linear(args[0], layer.weight)  # type: ignore[arg-type]
            found[name] = found.get(name, 0.0) + float(off.square().sum())

        return hook

    names = [name for name, layer in module.named_modules() if isinstance(layer, Int4Linear)]
    hooks = [dense.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.no_grad():
        for batch in data.batches:
            dense(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def texts() -> Calibration:
    """Return token ids enough to tell the inputs' directions apart."""
    ids = torch.randint(0, 96, (4, 8, 40), generator=torch.Generator().manual_seed(3))
    return Calibration(tuple({"input_ids": rows} for rows in ids))


@pytest.mark.parametrize(("method", "size", "even"), CELLS)
def test_it_is_foretold_saved_and_opened_again(
    method: str, size: Any, even: bool, subject: Subjects, logits: Logits, texts: Calibration, tmp_path: Path
) -> None:
    transform = int4(method=method, group_size=size, symmetric=even)
    assert Int4.model_validate_json(json.dumps(transform.step().settings)) == transform
    assert transform.needs_data == (method in ("awq", "gptq"))
    with torch.device("meta"):
        outline = subject()
        transform.check(Plan(outline))
        foretold = transform.preview(outline).module.state_dict()
    packed = transform.apply(subject(), texts if transform.needs_data else None)
    assert {name: tensor.shape for name, tensor in packed.module.state_dict().items()} == {name: t.shape for name, t in foretold.items()}
    layers = [layer for layer in packed.module.modules() if isinstance(layer, Int4Linear)]
    assert len(layers) == 21
    assert {layer.group_size for layer in layers} == ({64, 128} if size == "channel" else {32})
    assert all(bool((layer.tensors()[2] == 8).all()) for layer in layers) == even
    answers = logits(packed.module)
    assert torch.isfinite(answers).all()
    optkit.save(packed, tmp_path / "packed")
    again = optkit.load(tmp_path / "packed")
    assert torch.equal(logits(again.module), answers)
    assert again.history == packed.history


def test_the_outputs_on_the_calibration_data_are_nearer_than_by_rounding_to_nearest(subject: Subjects, texts: Calibration) -> None:
    dense = subject(5, tie_word_embeddings=False).module
    nearest = output_errors(int4().apply(subject(5, tie_word_embeddings=False)).module, dense, texts)
    made = output_errors(int4(method="gptq").apply(subject(5, tie_word_embeddings=False), texts).module, dense, texts)
    assert len(made) == 21
    first = "model.layers.0."  # later blocks are made for the inputs that the changed blocks before them give
    assert all(made[name] < nearest[name] for name in made if name.startswith(first))
    assert sum(made.values()) < 0.8 * sum(nearest.values())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_answers_are_nearer_to_those_of_the_dense_model(method: str, subject: Subjects, texts: Calibration) -> None:
    """With inputs that differ in size, as those of trained models do."""

    def build() -> nn.Module:
        module = subject(5).module
        scale = torch.logspace(-1, 1, 64)
        with torch.no_grad():
            for name, norm in module.named_modules():
                if name.endswith("layernorm"):
                    norm.weight.copy_(scale)
        return module

    def answers(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([module(**batch).logits for batch in texts.batches])

    dense = answers(build())
    nearest, made = (answers(int4(method=one).apply(build(), texts)) for one in ("rtn", method))
    assert (made - dense).norm() < 0.95 * (nearest - dense).norm()


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_same_data_gives_the_same_bits(method: str, subject: Subjects, texts: Calibration) -> None:
    one, other = (int4(method=method).apply(subject(), texts).module.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("data", [None, Calibration()])
def test_without_data_it_says_what_needs_none_and_changes_nothing(method: str, data: Any, subject: Subjects) -> None:
    whole = subject()
    with pytest.raises(TransformError, match=f"int4 by {method} needs calibration data; .* use method rtn or hqq"):
        int4(method=method).apply(whole.module, data)
    assert not any(isinstance(layer, Int4Linear) for layer in whole.module.modules())


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_weight_is_refused_by_the_name_of_the_layer(method: str, subject: Subjects, texts: Calibration) -> None:
    whole = subject()
    weight_of(whole.module.get_submodule("model.layers.2.mlp.down_proj"))[3, 5] = float("nan")
    with pytest.raises(
        TransformError, match=r"model.layers.2.mlp.down_proj: the weight holds NaN or infinity in 1 of 64 rows, first in row 3"
    ):
        int4(method=method).apply(whole, texts)


def test_inputs_that_are_not_finite_are_refused_by_the_name_of_the_layer(subject: Subjects, texts: Calibration) -> None:
    whole = subject()
    whole.module.get_submodule("model.layers.1.input_layernorm").weight.data[0] = float("inf")  # type: ignore[union-attr,operator,index]
    with pytest.raises(TransformError, match=r"model.layers.1.self_attn.q_proj: its inputs on the calibration data are not all finite"):
        int4(method="gptq").apply(whole, texts)
    with pytest.raises(TransformError, match="LlamaForCausalLM answers with NaN or infinity"):
        int4(method="awq").apply(whole, texts)


def test_hqq_and_symmetric_exclude_one_another() -> None:
    with pytest.raises(ValidationError, match="hqq chooses the zero point, and symmetric fixes it"):
        int4(method="hqq", symmetric=True)


def test_a_width_that_no_group_fits_is_refused_for_whole_rows_too(subject: Subjects) -> None:
    words = r"a group of a channel needs a multiple of 32, and in_features 100 of model.layers.0.mlp.down_proj .*exclude"
    with pytest.raises(TransformError, match=words):
        Int4(group_size="channel").check(Plan(subject(intermediate_size=100)))
    Int4(group_size="channel").check(Plan(subject(intermediate_size=160)))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_excluded_layers_stay_as_they_are_or_take_a_scale(method: str, subject: Subjects, texts: Calibration, logits: Logits) -> None:
    packed = int4(method=method, targets=Targets(exclude=("q_proj", "lm_head"))).apply(subject(), texts).module
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in packed.named_modules() if isinstance(layer, nn.Linear)}
    assert kinds.pop("q_proj") is kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {Int4Linear}
    assert (logits(packed) - logits(subject().module)).norm() < 0.5 * logits(subject().module).norm()


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_an_untied_head_is_packed_last(method: str, head: Any, subject: Subjects, texts: Calibration) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        packed = int4(method=method, head=head).apply(subject(tie_word_embeddings=False), texts).module
    assert type(packed.get_submodule("lm_head")) is (Int4Linear if head == "int4" else Int8Linear)
    expected = ["awq: nothing can take a scale from 1 of 22 layers (lm_head); rounded to nearest without one"]
    assert [str(one.message) for one in told] == (expected if (method, head) == ("awq", "int4") else [])


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    module: nn.Module = BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, initializer_range=0.2, **sizes)).eval()
    return module


def encoded(module: nn.Module, data: Calibration) -> Tensor:
    with torch.no_grad():
        states: Tensor = module(**data.batches[0]).last_hidden_state
    return states


def test_an_encoder_is_calibrated_by_its_own_inputs_and_awq_tells_where_no_scale_can_go() -> None:
    ids = torch.randint(0, 96, (4, 24))
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    data = Calibration(({"input_ids": ids, "attention_mask": mask},))
    before = encoded(encoder(), data)
    with pytest.warns(
        OptkitWarning, match=r"awq: nothing can take a scale from 11 of 13 layers \(encoder.layer.0.attention.self.query, .*\)"
    ):
        awq = int4(method="awq").apply(encoder(), data)
    gptq = int4(method="gptq").apply(encoder(), data)
    nearest = int4().apply(encoder())
    errors = [float((encoded(module, data) - before).norm() / before.norm()) for module in (awq, gptq, nearest)]
    assert max(errors) < 0.3
    assert errors[1] < 0.8 * errors[2]


def test_a_plain_network_is_calibrated_by_its_own_inputs() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    x = torch.randn(200, 64) @ torch.randn(64, 64)
    before = build()(x).detach()
    errors = {}
    for method in METHODS:
        made = int4(method=method).apply(build(), Calibration(({"input": x},)))
        assert [type(layer) for layer in made] == [nn.LayerNorm, Int4Linear, nn.ReLU, Int4Linear]  # type: ignore[arg-type]
        errors[method] = float((made(x).detach() - before).norm() / before.norm())
    assert max(errors.values()) < 0.2
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_where_no_scale_can_move_awq_is_refused_with_the_methods_that_work() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with pytest.raises(TransformError, match=r"awq finds no norm or linear layer in Sequential .* use method gptq or hqq"):
        int4(method="awq").apply(network, Calibration(({"input": torch.randn(9, 64)},)))
    assert type(network[0]) is nn.Linear


def test_a_bare_layer_is_calibrated_too() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(100, 64) @ torch.randn(64, 64)
    dense = layer.weight.detach().clone()
    made = int4(method="gptq").apply(layer, Calibration(({"input": x},)))
    assert isinstance(made, Int4Linear)
    nearest = Int4Linear.from_weight(dense, None, 32)
    assert (x @ (made.weight - dense).T).norm() < 0.8 * (x @ (nearest.weight - dense).T).norm()
    with pytest.raises(TransformError, match=r"awq finds no norm"):
        int4(method="awq").apply(nn.Linear(64, 32), Calibration(({"input": x},)))


def test_a_layer_that_no_data_reaches_is_told() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.used(x)
            return made

    with pytest.warns(OptkitWarning, match=r"gptq: no calibration data reached 1 of 2 layers \(idle\); rounded to nearest"):
        made = int4(method="gptq").apply(Fork(), Calibration(({"x": torch.randn(99, 64)},)))
    assert isinstance(made.get_submodule("idle"), Int4Linear)
