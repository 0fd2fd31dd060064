"""What every registered transform promises. Registering one is enough to be tested, once it has its line in ``SETTINGS``."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.low_rank import LowRankLinear
from optkit.transforms import TRANSFORMS, Plan, Stage, Transform

SETTINGS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "merge": {"models": ("./other",)},
    "ensemble": {"models": ("./other",)},
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "drop_layers": {"layers": (1,)},
    "prune_channels": {"ratio": 0.5},
    "prune_ffn": {"ratio": 0.5},
    "prune_heads": {"ratio": 0.5},
    "prune_hidden": {"ratio": 0.5, "multiple": 32},
    "low_rank": {"method": "plain"},
    "distill": {"steps": 2},
    "dtype": {"dtype": "bfloat16"},
    "int8": {},
    "int4": {},
    "qat": {"steps": 2},
    "smoothquant": {},
    "mixed": {"layers": {"*": "int8"}},
    "nf4": {},
    "llm_int8": {},
    "compile": {},
    "kv_cache": {},
    "offload": {},
    "chunked_prefill": {"tokens": 5},
    "prefix_cache": {},
    "static_cache": {},
    "sliding_window": {},
    "prompt_lookup": {},
    "bucketing": {},
    "draft": {},
    "adaptive": {"ways": ({"bits": 8},), "batch_sizes": (1,), "prompt_tokens": (8,), "perplexities": (1.0, 1.0)},
    "data_parallel": {"size": 2},
    "tensor_parallel": {"size": 2},
    "pipeline_parallel": {"size": 2, "stages": (2, 1)},
}
NOT_FOR_BARE_MODULES = {
    "drop_layers": "no list of repeated blocks",
    "ensemble": "this model is no causal language model",
    "prune_ffn": "is no model of transformers",
    "prune_heads": "is no model of transformers",
    "prune_hidden": "is no model of transformers",
    "data_parallel": "a bare module has no place",
    "tensor_parallel": "a bare module has no place",
    "pipeline_parallel": "a bare module has no place",
    "compile": "a bare module has none",
    "kv_cache": "a bare module has none",
    "offload": "a bare module has no file",
    "chunked_prefill": "a bare module has none",
    "prefix_cache": "a bare module has none",
    "static_cache": "a bare module has none",
    "sliding_window": "a bare module has none",
    "prompt_lookup": "a bare module has none",
    "bucketing": "a bare module is given them",
    "draft": "a bare module has none",
    "adaptive": "a bare module has none",
    "smoothquant": "no place in Sequential",
}
RESHAPED = {"ensemble", "draft", "adaptive", "prune_ffn", "prune_heads", "prune_hidden", "low_rank"}
NEEDS_ZEROS = {"sparse"}  # and how many there are is no matter of shapes
COMPOSITION = ["drop_layers", "magnitude", "int4"]
NOT_FOR_LANGUAGE_MODELS = {
    "prune_channels": "is a model of transformers; use prune_ffn, prune_heads or prune_hidden",
    "bucketing": "this one generates",
}
NOT_FOR_A_BARE_LAYER = {"prune_channels"}  # whose outputs are the answers
NAMES = sorted(name for name in TRANSFORMS if name not in NOT_FOR_LANGUAGE_MODELS)
BARE = [name for name in TRANSFORMS if name not in NOT_FOR_BARE_MODULES]
PLAN = {"batch_sizes": (1, 8), "threads": 1}
Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]
OPEN_AGAIN = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
kept = load_file(root / "kept.safetensors")
found = {}

def equal(name, module):
    with torch.inference_mode():
        return torch.equal(module.eval()(input_ids=kept["ids"], use_cache=False).logits, kept[name])

for name in sys.argv[2].split(","):
    found[f"transformers:{name}"] = equal(name, AutoModelForCausalLM.from_pretrained(root / name, dtype="auto"))
assert "optkit" not in sys.modules
import optkit

for name in sorted(set(kept) - {"ids"}):
    subject = optkit.load(root / name)
    found[f"optkit:{name}"] = equal(name, subject.module) and subject.tokenizer is not None
print(json.dumps(found))
"""


def make(name: str) -> Transform:
    return TRANSFORMS[name](**SETTINGS[name])


def applied(name: str, model: Any) -> Any:
    """Return the model with the transform applied, which is given data where it needs some."""
    transform = make(name)
    if name in NEEDS_ZEROS:
        with torch.no_grad():
            for layer in (model.module if isinstance(model, Subject) else model).modules():
                if isinstance(layer, nn.Linear):
                    layer.weight[:, ::2] = 0
    batch = {"input_ids": torch.arange(2, 34).view(2, 16)} if isinstance(model, Subject) else {"input": torch.ones(2, 64)}
    other = copy.deepcopy(model.module if isinstance(model, Subject) else model)
    return transform.apply(
        model, Calibration((batch,), untouched=lambda: other, open_model=lambda spec: other) if transform.needs_data else None
    )


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (layer.in_features, layer.out_features) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture(scope="module")
def opened(subject: Subjects, logits: Logits, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Save a subject after each transform, open all of them in one new process, and return whose logits are equal there."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("artefacts")
    kept = {"ids": ids}
    plain = []
    for name, steps in {**{name: [name] for name in NAMES}, "composition": COMPOSITION}.items():
        changed = subject()
        for step in steps:
            changed = applied(step, changed)
        kept[name] = logits(changed.module)
        optkit.save(changed, root / name)
        if changed.opens_in == "transformers":
            plain.append(name)
    save_file(kept, root / "kept.safetensors")
    command = [sys.executable, "-c", OPEN_AGAIN, str(root), ",".join(plain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_registered_transform_is_tested_here() -> None:
    assert set(SETTINGS) == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_declares_stage_execution_loader_and_says_what_each_setting_is(name: str) -> None:
    kind = TRANSFORMS[name]
    assert isinstance(kind.stage, Stage)
    assert kind.execution in {"real", "simulated", "neutral"}
    assert kind.opens_in in {"transformers", "optkit"}
    assert (kind.__doc__ or "").strip()
    assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_its_step_can_be_written_down_and_made_again(name: str) -> None:
    step = make(name).step()
    assert step.name == name
    assert TRANSFORMS[name].model_validate_json(json.dumps(step.settings)) == make(name)


@pytest.mark.parametrize("name", NAMES)
def test_check_changes_nothing(name: str, subject: Subjects) -> None:
    whole = subject()
    before = {key: tensor.clone() for key, tensor in whole.module.state_dict().items()}
    written, config = repr(whole.module), whole.module.config.to_dict()  # type: ignore[union-attr,operator]
    make(name).check(Plan(whole, **PLAN))  # type: ignore[arg-type]
    after = whole.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert repr(whole.module) == written
    assert whole.module.config.to_dict() == config  # type: ignore[union-attr,operator]
    assert whole.history == ()


@pytest.mark.parametrize("name", NAMES)
def test_check_and_preview_need_shapes_only_and_foretell_them(name: str, subject: Subjects) -> None:
    with torch.device("meta"):
        outline = subject()
        make(name).check(Plan(outline, **PLAN))  # type: ignore[arg-type]
        foretold = make(name).preview(outline)
    assert all(tensor.is_meta for tensor in foretold.module.state_dict().values())
    real = applied(name, subject())
    assert name in NEEDS_ZEROS or shapes(foretold.module) == shapes(real.module)
    assert foretold.history == real.history


@pytest.mark.parametrize("name", NAMES)
def test_history_grows_by_one_step(name: str, subject: Subjects) -> None:
    transform = make(name)
    once = applied(name, subject())
    assert once.history == (transform.step(),)
    again = TRANSFORMS["dtype"](dtype="float32").apply(once)  # type: ignore[call-arg]
    assert [step.name for step in again.history] == [name, "dtype"]
    assert once.opens_in == transform.opens_in
    assert once.execution == ("simulated" if transform.execution == "simulated" else "real")


@pytest.mark.parametrize("name", NAMES)
def test_layers_stay_findable_with_their_true_sizes(name: str, subject: Subjects) -> None:
    before = linears(subject().module)
    after = linears(applied(name, subject()).module)
    assert after
    if name in RESHAPED:
        sizes = {name: layer.weight.shape for name, layer in applied(name, subject()).module.named_modules() if name in after}
        assert sizes == {layer: (rows, columns) for layer, (columns, rows) in after.items()}
        return
    assert {layer: before.get(layer) for layer in after} == after
    if name != "drop_layers":
        assert after.keys() == before.keys()


@pytest.mark.parametrize("name", [*NAMES, "composition"])
def test_saved_and_opened_in_a_new_process_the_logits_are_equal(name: str, opened: dict[str, bool]) -> None:
    assert opened[f"optkit:{name}"]


@pytest.mark.parametrize("name", [name for name in NAMES if TRANSFORMS[name].opens_in == "transformers"])
def test_what_says_that_it_opens_in_transformers_opens_there_with_equal_logits(name: str, opened: dict[str, bool]) -> None:
    assert opened[f"transformers:{name}"]


@pytest.mark.parametrize("name", BARE)
def test_a_bare_module_is_changed_saved_and_opened_again(name: str, mlp: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = applied(name, mlp())
    assert isinstance(module, nn.Module)
    kind = next(parameter.dtype for parameter in module.parameters())
    x = torch.randn(5, 64).to(kind)
    with torch.inference_mode():
        expected = module(x)
        optkit.save(module, tmp_path / "saved")
        again = optkit.load(tmp_path / "saved", into=mlp()).module
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", [name for name in BARE if name not in NOT_FOR_A_BARE_LAYER])
def test_a_bare_linear_layer_is_changed_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    layer = applied(name, nn.Linear(64, 32))
    assert isinstance(layer, nn.Linear | LowRankLinear)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.bias is not None
    x = torch.randn(5, 64).to(layer.bias.dtype)
    with torch.inference_mode():
        optkit.save(layer, tmp_path / "saved")
        assert torch.equal(optkit.load(tmp_path / "saved", into=nn.Linear(64, 32)).module(x), layer(x))


@pytest.mark.parametrize("name", NOT_FOR_LANGUAGE_MODELS)
def test_what_a_language_model_cannot_have_is_refused(name: str, subject: Subjects) -> None:
    with pytest.raises(TransformError, match=NOT_FOR_LANGUAGE_MODELS[name]):
        make(name).check(Plan(subject()))
    with pytest.raises(TransformError, match=NOT_FOR_LANGUAGE_MODELS[name]):
        applied(name, subject())


@pytest.mark.parametrize("name", sorted(NOT_FOR_BARE_MODULES))
def test_what_a_bare_module_cannot_have_is_refused(name: str, mlp: Callable[[], nn.Module]) -> None:
    with pytest.raises(TransformError, match=NOT_FOR_BARE_MODULES[name]):
        applied(name, mlp())


def test_in_a_composition_each_transform_finds_what_the_one_before_left(subject: Subjects) -> None:
    pruned = make("magnitude").apply(make("drop_layers").apply(subject()))
    layers = {name: layer for name, layer in pruned.module.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
    assert len(layers) == 2 * 7
    zeros = {name: layer.weight.detach() == 0 for name, layer in layers.items()}
    assert all(zero.sum() == zero.numel() // 2 for zero in zeros.values())
    packed = make("int4").apply(pruned)
    assert [step.name for step in packed.history] == COMPOSITION
    assert (packed.execution, packed.opens_in) == ("real", "optkit")  # int4 runs for real; that magnitude does not stands in its step
    for name, zero in zeros.items():
        layer = packed.module.get_submodule(name)
        assert isinstance(layer, Int4Linear)
        half_a_step = layer.tensors()[1].float().repeat_interleave(layer.group_size, dim=1) / 2
        assert (layer.weight.detach().abs() <= half_a_step * 1.02)[zero].all()  # zero need not be one of the sixteen values


def test_zeros_survive_int8_exactly(subject: Subjects) -> None:
    pruned = make("magnitude").apply(subject())
    name = "model.layers.0.mlp.up_proj"
    zero = pruned.module.get_submodule(name).weight.detach() == 0  # type: ignore[operator]
    weight = make("int8").apply(pruned).module.get_submodule(name).weight
    assert int(zero.sum()) == zero.numel() // 2
    assert (weight[zero] == 0).all()  # type: ignore[index]
