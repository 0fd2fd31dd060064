"""Plans from shapes: bytes as they will be, times by the law of each kind, and a warning where nothing is to be gained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optkit.core.subject import Subject
from optkit.harness.machine import KINDS, keep_laws, known_laws
from optkit.harness.planning import kind_of_law, plan, plan_of
from optkit.measure.law import PARAMETERS, Law
from optkit.recipe.reading import recipe_from_dict
from optkit.transforms import Int4, Int8, Magnitude

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SLOW = (1e-4, 5e-3, 1e10, 1e10, 5e7, 1e11, 8.0, 1e11, 1e10)  # 5 ms a module: nothing that makes weights smaller helps
FAST = (1e-6, 1e-8, 1e10, 1e10, 5e7, 1e13, 8.0, 1e13, 1e12)  # reading weights is all that counts


def law(values: tuple[float, ...]) -> Law:
    found = dict(zip(PARAMETERS, values, strict=True))
    return Law(found, {name: (value, value) for name, value in found.items()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    return tmp_path


def recipe(*steps: Any, **changes: Any) -> Any:
    return recipe_from_dict({"name": "own", "model": "shape:llama-25m", "threads": 1, "transforms": list(steps)} | changes)


def test_laws_are_kept_for_this_machine_and_number_of_threads() -> None:
    assert known_laws(1) == {}
    keep_laws(1, {"float32": law(FAST)})
    keep_laws(1, {"int8": law(SLOW)})
    assert known_laws(1) == {"float32": law(FAST), "int8": law(SLOW)} and known_laws(2) == {}


def test_where_reading_weights_counts_smaller_ones_are_predicted_to_be_faster() -> None:
    keep_laws(1, {kind: law(FAST) for kind in KINDS})
    found = plan_of(recipe("int8"))
    before, after = found.steps
    assert (before.kind, after.kind) == ("float32", "int8") and not after.warnings
    assert after.token_bytes < 0.3 * before.token_bytes and after.stored_bytes < 0.4 * before.stored_bytes
    assert found.ratio("tpot_ms") == pytest.approx(0.26, abs=0.06)
    assert json.loads(found.to_json())["ratios"]["tpot_ms"] == found.ratio("tpot_ms")


def test_no_gain_is_said_where_overhead_takes_the_time() -> None:
    keep_laws(1, {kind: law(SLOW) for kind in KINDS})
    found = plan_of(recipe("int8"))
    assert "no gain expected in time per token: overhead-bound at this size" in found.steps[1].warnings[0]
    assert "overhead-bound" in found.to_markdown()


def test_zeros_that_nothing_skips_are_said_to_be_masks_alone() -> None:
    found = plan_of(recipe({"magnitude": {"sparsity": 0.5}}))
    assert found.steps[1].warnings == ("mask only: zeros are stored and multiplied like any other number; no gain in speed or size",)
    assert found.steps[1].stored_bytes == found.steps[0].stored_bytes


def test_without_a_law_bytes_are_told_and_how_to_get_times() -> None:
    found = plan_of(recipe("int4"))
    assert found.ratio("tpot_ms") is None and found.steps[1].stored_bytes < 0.4 * found.steps[0].stored_bytes
    assert found.notes == (
        "no law of this machine is known for float32 with 1 threads: optkit law --kind float32",
        "no law of this machine is known for int4 with 1 threads: optkit law --kind int4",
    )


def test_what_several_processes_serve_has_no_law() -> None:
    keep_laws(1, {kind: law(FAST) for kind in KINDS})
    found = plan_of(recipe({"data_parallel": {"size": 2}}, measure={"latency": {"batch_sizes": [2]}}))
    assert found.steps[1].kind is None and "2 processes" in found.steps[1].warnings[1]


@pytest.mark.parametrize("step", ["data_parallel", "pipeline_parallel", "kv_cache", "offload", "nf4", "llm_int8"])
def test_steps_that_cannot_make_a_request_faster_are_said_not_to(step: str) -> None:
    found = plan_of(recipe(step, measure={"latency": {"batch_sizes": [2]}}))
    assert found.steps[1].warnings[0].startswith("no gain expected in time per token: ")


def test_what_is_slow_on_processors_alone_is_not_said_of_a_gpu() -> None:
    found = plan_of(recipe("nf4", device="cuda"))
    assert not any("no gain expected" in warning for warning in found.steps[1].warnings)


def test_what_has_no_law_is_said_not_to_be_predicted_once() -> None:
    found = plan_of(recipe({"magnitude": {"sparsity": 0.5}}, "sparse", {"dtype": {"dtype": "bfloat16"}}))
    assert found.steps[2].warnings == ("times are not predicted: no law for sparse",) and not found.steps[3].warnings


@pytest.mark.parametrize(
    ("settings", "wanted"), [({"bits": 8}, 8 * 68), ({"bits": 4, "group_size": 16}, 8 * 48), ({"keep_recent": 10**6}, 8 * 256)]
)
def test_a_packed_cache_is_planned_with_its_bytes(settings: dict[str, int], wanted: int) -> None:
    whole, packed = plan_of(recipe({"kv_cache": settings})).steps
    assert packed.cache_bytes == pytest.approx(whole.cache_bytes * wanted / (8 * 256), rel=1e-3)
    assert packed.serving_bytes - whole.serving_bytes == packed.cache_bytes - whole.cache_bytes


def test_the_kind_follows_the_layers_and_the_engine(tiny_llama: Any) -> None:
    assert kind_of_law(Subject(tiny_llama(), "own")) == "float32"
    assert kind_of_law(Magnitude().apply(Subject(tiny_llama(), "own"))) == "float32"
    assert kind_of_law(Int8().apply(Subject(tiny_llama(), "own"))) == "int8"
    assert kind_of_law(Int4().apply(Subject(tiny_llama(), "own"))) == "int4"


def test_what_is_known_of_a_prompt_is_not_planned_again_and_pieces_are_planned_one_by_one() -> None:
    keep_laws(1, {"float32": law((1e-4, 1e-5, 1e10, 1e10, 5e7, 1e11, 8.0, 1e11, 1e10))})
    shared = {"measure": {"latency": {"prompt_tokens": 128, "shared_tokens": 96}}}
    whole, known = plan_of(recipe(**shared)), plan_of(recipe("prefix_cache", **shared))
    alone = plan_of(recipe(measure={"latency": {"prompt_tokens": 32}}))
    assert whole.ratio("ttft_ms") == 1 and known.steps[1].ttft_ms is not None and alone.steps[0].ttft_ms is not None
    assert known.steps[1].ttft_ms == pytest.approx(alone.steps[0].ttft_ms, rel=0.1) and known.ratio("ttft_ms") < 0.5
    chunked = plan_of(recipe({"chunked_prefill": {"tokens": 16}}))
    assert chunked.ratio("ttft_ms") > 1.2 and chunked.ratio("tpot_ms") == 1
    assert "the first token is expected to take" in chunked.steps[1].warnings[0]
    assert chunked.steps[1].serving_bytes < chunked.steps[0].serving_bytes


def test_items_are_planned_as_long_as_the_task_makes_them() -> None:
    keep_laws(1, {"float32": law((1e-6, 1e-8, 1e12, 1e12, 5e7, 1e10, 8.0, 1e13, 1e12))})
    model = {"transformer-forecaster": {"hidden_size": 64, "layers": 2}}
    short, long = (
        plan_of(recipe(model=model, task={"forecasting": {"window": days}}, measure={"latency": {}})).steps[0].ttft_ms for days in (32, 64)
    )
    assert short is not None and long == pytest.approx(72 / 40 * short, rel=0.1)  # eight rows are half of the rate


def test_no_gain_is_said_of_items_too() -> None:
    keep_laws(1, {kind: law(SLOW) for kind in KINDS})
    found = plan_of(recipe("int8", model={"transformer-forecaster": {"hidden_size": 64, "layers": 2}}, task="forecasting"))
    assert "no gain expected in time per item: overhead-bound at this size" in found.steps[1].warnings[0]


def test_steps_in_one_call_have_no_overhead_of_modules() -> None:
    keep_laws(1, {kind: law(SLOW) for kind in KINDS})
    assert plan_of(recipe("compile")).ratio("tpot_ms") < 0.1


def test_a_type_that_is_not_measured_has_no_law() -> None:
    found = plan_of(recipe({"dtype": {"dtype": "float16"}}))
    assert found.steps[1].kind is None and found.steps[1].unlawful == "float16"
    assert not any("float16" in note for note in found.notes)


@pytest.mark.parametrize("path", sorted([*RECIPES.glob("*.yaml"), *(RECIPES / "scale").glob("llama-*.yaml")]), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(path: Path) -> None:
    if path.stem.endswith("-cuda"):
        pytest.skip("a plan for a GPU needs one")
    found = plan(path)
    assert found.steps[0].name == "baseline" and all(step.serving_bytes > step.stored_bytes > 0 for step in found.steps)
    assert found.to_markdown().count("\n| ") >= len(found.steps)
