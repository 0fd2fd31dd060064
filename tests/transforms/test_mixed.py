"""Four bits here and eight there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.models.sources import outline_model
from optkit.transforms import Mixed, Plan
from optkit.transforms.quantize.sensitivity import Probe

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


def formats(module: nn.Module) -> dict[str, str]:
    kinds = {Int4Linear: "int4", Int8Linear: "int8", nn.Linear: "keep"}
    return {name: kinds[type(layer)] for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}  # type: ignore[index]


def average_bits(module: nn.Module) -> float:
    layers = [layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    stored = sum(8 * sum(t.nbytes for t in (layer.tensors() if hasattr(layer, "tensors") else [layer.weight])) for layer in layers)
    return stored / sum(layer.in_features * layer.out_features for layer in layers)


@pytest.mark.parametrize("bits", [5.0, 5.8, 7.0, 9.0])
def test_the_average_of_the_stored_bits_keeps_the_budget_and_uses_it(subject: Subjects, calibration: Calibration, bits: float) -> None:
    packed = Mixed(bits=bits, group_size=32).apply(subject(3), calibration)
    reached = average_bits(packed.module)
    assert reached <= bits
    assert reached > min(bits, 8.4) - 0.3  # a layer of 64 x 128 of 3 x 45056 weights takes 0.2 more
    assert formats(packed.module)["lm_head"] == "int8"


def test_layers_that_move_no_answer_get_the_fewest_bits_and_the_others_the_rest(subject: Subjects, calibration: Calibration) -> None:
    module = subject(3).module
    with torch.no_grad():
        module.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()  # type: ignore[operator,union-attr]
    chosen = Mixed(bits=8.2, group_size=32).decide(module, calibration).layers
    assert {name for name, form in chosen.items() if form == "int4"} == {name for name in chosen if name.startswith("model.layers.1.mlp.")}


def test_measuring_leaves_the_module_as_it_was(subject: Subjects, calibration: Calibration) -> None:
    module, fresh = subject(3).module, subject(3).module
    for budget in ({"bits": 6.0}, {"kl": 1e-2}):
        Mixed(group_size=32, **budget).decide(module, calibration)  # type: ignore[arg-type]
        assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_a_budget_of_divergence_is_kept_by_all_layers_together_with_no_more_bits_than_needed(
    subject: Subjects, calibration: Calibration
) -> None:
    reached = {}
    for kl in (3e-2, 3e-3):
        module = subject(3).module
        probe = Probe(module, calibration, 1)
        packed = Mixed(kl=kl, group_size=32, targets=Targets(exclude=("lm_head",))).apply(module, calibration)
        assert probe.distance() <= kl * 1.1  # kernels may round activations to bfloat16
        reached[kl] = average_bits(packed)
        assert {"int4", "int8"} >= {form for name, form in formats(packed).items() if name != "lm_head"}
    assert 5.0 <= reached[3e-2] < reached[3e-3] <= 8.5


def test_a_divergence_that_no_choice_keeps_is_refused_unless_layers_may_stay(subject: Subjects, calibration: Calibration) -> None:
    with pytest.raises(TransformError, match=r"kl 1e-12 cannot be kept: the best formats give .*; allow that much, or add keep to formats"):
        Mixed(kl=1e-12, group_size=32).apply(subject(), calibration)
    kept = Mixed(kl=1e-6, group_size=32, formats=("int4", "int8", "keep"), targets=Targets(exclude=("lm_head",)))
    assert "keep" in formats(kept.apply(subject(), calibration).module).values()


def test_the_choice_stands_in_the_history_and_repeats_without_data(subject: Subjects, calibration: Calibration, logits: Logits) -> None:
    packed = Mixed(bits=6.0, group_size=32).apply(subject(3), calibration)
    (step,) = packed.history
    assert step.settings["bits"] == 6.0
    assert step.settings["layers"] == {name: form for name, form in formats(packed.module).items() if name != "lm_head"}
    again = Mixed.model_validate_json(json.dumps(step.settings))
    assert not again.needs_data
    assert torch.equal(logits(again.apply(subject(3)).module), logits(packed.module))


def test_saved_and_opened_again_the_answers_and_the_history_are_equal(
    subject: Subjects, calibration: Calibration, logits: Logits, tmp_path: Path
) -> None:
    packed = Mixed(bits=6.0, group_size=32).apply(subject(3), calibration)
    optkit.save(packed, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    assert torch.equal(logits(again.module), logits(packed.module))
    assert outline_model(str(tmp_path / "saved")).history == again.history == packed.history


def test_a_bare_module_is_judged_by_the_error_of_its_outputs(mlp: Callable[[], nn.Module]) -> None:
    data = Calibration(({"input": torch.randn(32, 64)},))
    packed = Mixed(bits=6.5, group_size=32).apply(mlp(), data)
    assert set(formats(packed).values()) == {"int4", "int8"}
    for form, kind in (("int4", Int4Linear), ("int8", Int8Linear), ("keep", nn.Linear)):
        layer = Mixed(layers={"*": form}).apply(nn.Linear(64, 32))  # type: ignore[dict-item]
        assert type(layer) is kind
    assert type(Mixed(bits=8.6).apply(nn.Linear(64, 32), Calibration(({"input": torch.randn(4, 64)},)))) is Int8Linear


def test_patterns_of_layers_are_taken_in_order(subject: Subjects) -> None:
    packed = Mixed(layers={"model.layers.0.*": "keep", "down_proj": "int8", "*": "int4"}, group_size=32).apply(subject())
    found = formats(packed.module)
    assert {found[name] for name in found if name.startswith("model.layers.0.")} == {"keep"}
    assert found["model.layers.1.mlp.down_proj"] == "int8" and found["model.layers.1.mlp.up_proj"] == "int4"
    assert found["lm_head"] == "int8"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"bits": 4.2}, TransformError, r"a budget of 4.2 bits a weight is less than the 4.500 that the smallest formats take"),
        ({"bits": 8.0, "formats": ("int8",)}, TransformError, r"a budget of 8 bits a weight is less than the 8\.\d+ that"),
        (
            {"bits": 5, "group_size": 128, "formats": ("int4",)},
            TransformError,
            r"group_size 128 does not divide in_features 64 of .*add int8",
        ),
        ({"layers": {"nothing": "int8"}}, TargetError, r"layers: pattern 'nothing' matches none of the 21 layers"),
        ({"layers": {"down_proj": "int8"}}, TransformError, r"layers: no pattern matches .*q_proj \(18 of 21 layers\); add '\*': keep"),
        ({"layers": {"*": "int4"}, "group_size": 128}, TransformError, r"group_size 128 does not divide in_features of .*q_proj"),
        ({"bits": 6, "targets": Targets(exclude=("nothing",))}, TargetError, "pattern 'nothing' matches none"),
    ],
)
def test_what_cannot_work_is_refused_on_shapes_alone(subject: Subjects, settings: dict[str, Any], error: Any, words: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=words):
        Mixed(**settings).check(Plan(subject()))


def test_a_layer_too_narrow_for_groups_is_int8(subject: Subjects, calibration: Calibration) -> None:
    found = formats(Mixed(bits=8.0, group_size=128).apply(subject(), calibration).module)
    assert {form for name, form in found.items() if "down_proj" not in name} == {"int8"}
    assert "int4" in found.values()


def test_one_budget_is_asked_for(subject: Subjects) -> None:
    for settings in ({}, {"bits": 5.0, "kl": 0.1}):
        with pytest.raises(ValueError, match="give one budget: bits, the average bits a weight, or kl, the divergence allowed"):
            Mixed(**settings)  # type: ignore[arg-type]
    assert Mixed(bits=5.0).needs_data
    with pytest.raises(TransformError, match=r"mixed needs calibration data .*layers: \{'\*': int8\}"):
        Mixed(bits=5.0).apply(subject())


def test_a_preview_has_a_choice_without_data(subject: Subjects) -> None:
    with torch.device("meta"):
        foretold = Mixed(bits=6.0, group_size=32).preview(subject())
    assert formats(foretold.module)["model.layers.0.mlp.up_proj"] == "int4"
