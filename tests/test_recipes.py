"""Every shipped recipe is run, the large ones in their smoke form: the same transforms on a tiny shape.

The arms share this process: in processes of their own, which other tests start, every run would open and warm each of them for itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import optkit
from optkit.core import files
from optkit.harness import stages
from optkit.harness.arm import Arm
from optkit.harness.checking import check_recipe
from optkit.harness.hosts import HERE, Hosts
from optkit.harness.processes import Tell, Workers
from optkit.recipe.reading import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = sorted(RECIPES.glob("*.yaml"))
SCALE = [
    pytest.param(path, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")])
    if path.stem.endswith("-cuda")
    else path
    for path in sorted((RECIPES / "scale").glob("*.yaml"))
]
WORKLOADS = sorted((RECIPES / "workloads").glob("*.yaml"))
SHORT = ["threads=1", "measure.latency.seconds=1", "measure.latency.new_tokens=10", "measure.latency.prompt_tokens=16"]
QUICKER = {
    "qat-int4": ("transforms.0.qat.steps=2",),
    "mixed": ("transforms.0.mixed={layers: {'*': int8}}",),
    "gradual50": ("transforms.0.distill.steps=2",),
    "prune_heads50": ("transforms.1.distill.steps=2",),
    "pruned25": ("transforms.2.distill.steps=2",),
    "low_rank20": ("transforms.0.low_rank.targets={include: ['*.layers.0.*']}",),
    "data_parallel2": ("measure.latency.batch_sizes=[1, 2]",),
    "pipeline_parallel2": ("measure.latency.batch_sizes=[1, 4]",),
    "int4-awq": ("transforms.0.int4.targets={include: ['*.layers.0.*']}",),
    "int4-gptq": ("transforms.0.int4.targets={include: ['*.layers.0.*']}",),
    "int4-gptq-compiled": ("transforms.0.int4.targets={include: ['*.layers.0.*']}",),
    "distill-ranks2": ("transforms.1.distill.steps=2",),
    "llama-135m-pipeline2": ("measure.latency.batch_sizes=[1, 4]",),
    "llama-1b-offload": ("transforms.0.offload.host_memory=300KB",),
    "composed": ("transforms.2.distill.steps=2",),
    "adaptive": (
        "transforms.2.adaptive.batch_sizes=[1]",
        "transforms.2.adaptive.prompt_tokens=[16]",
        "measure.latency.mix=[{prompt_tokens: 16, new_tokens: 4}]",
    ),
    "assistant-int4": (
        "measure.assistant={requests: 8, prompt_tokens: [8, 12], new_tokens: [2, 4]}",
        "measure.documents={documents: 2, together: 2, prompt_tokens: 16, new_tokens: 4}",
    ),
}
FEW_ITEMS = {
    "translation-composed": ("task.translation.items=60",),
    "qa-composed": ("task.question-answering.items=60",),
    "summarization-composed": ("task.summarization.items=60", "task.summarization.packages=0"),
    "gpt2-composed": ("task={text-generation: {windows: 60}}",),
}
TEXTS = "optkit/harness/*.py"  # a small corpus: that of the standard library takes every process some seconds
WITH_ALL_ARMS = {"int8", "composed"}  # the others are run without those of other dtypes and between their steps
TINY = "{shape: {layers: 2, hidden_size: 128, heads: 2, intermediate_size: 256, vocabulary: 512}}"


class WorkersHere:
    """One arm; what goes to it and comes from it is JSON, as between processes."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._tell: Tell | None = None
        self._arm = Arm(0, 1, "", threads, lambda text: self._tell(text) if self._tell else None)
        self._answers: list[Any] = []

    def ask(self, do: str, deadline_s: float = 0, tell: Tell | None = None, **arguments: Any) -> Any:
        return self.ask_all(do, deadline_s, tell, **arguments)[0]

    def ask_all(self, do: str, deadline_s: float = 0, tell: Tell | None = None, **arguments: Any) -> list[Any]:
        self._tell = tell
        self.send(do, **arguments)
        return self.gather()

    def send(self, do: str, **arguments: Any) -> None:
        answer = getattr(self._arm, f"do_{do}")(**json.loads(json.dumps(arguments)))
        self._answers.append(json.loads(json.dumps({} if answer is None else answer)))

    def gather(self, deadline_s: float = 0, tell: Tell | None = None) -> list[Any]:
        return [self._answers.pop(0)]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        yield

    def pause(self) -> None:
        pass

    def end(self) -> None:
        pass

    def __enter__(self) -> WorkersHere:
        return self

    def __exit__(self, *error: object) -> None:
        torch.compiler.reset()


def workers(name: str, threads: int, folder: Path, ranks: int = 1, hosts: Hosts = HERE) -> Workers | WorkersHere:
    """Return an arm of this process; ranks, which must meet, are processes all the same."""
    return Workers(name, threads, folder, ranks) if ranks > 1 else WorkersHere(name, threads)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a recipe to its sealed folder and gives the report that stands in it."""

    def to_the_end(recipe: Path, *overrides: str) -> dict[str, Any]:
        monkeypatch.setattr(stages, "Workers", workers)
        if recipe.stem not in WITH_ALL_ARMS:
            monkeypatch.setattr(stages, "_REFERENCES", ())
            monkeypatch.setattr(
                stages.Stages, "_unaffordable", lambda self, names, ranks: [name for name in names if name.startswith("step-")]
            )
        optkit.run(recipe, quick=True, out=tmp_path, overrides=(*SHORT, *overrides))
        (folder,) = (tmp_path / recipe.stem).iterdir()
        files.verify(folder)
        return json.loads((folder / "report.json").read_text())

    return to_the_end


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_and_reports(recipe, run):
    report = run(recipe, f"task={{language-modeling: {{corpus: {TEXTS}, tokens: 512, window: 128}}}}", *QUICKER.get(recipe.stem, ()))
    compared = {entry["metric"]: entry for entry in report["comparisons"] if entry["arm"] == "optimized"}
    times = {"mix_ms"} if recipe.stem == "adaptive" else {"tpot_ms", "ttft_ms"}
    assert times | {"perplexity", "artefact_bytes"} <= compared.keys()
    assert all(entry["verdict"] in ("better", "worse", "same", "unclear") for entry in compared.values())
    assert report["noise"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SCALE, ids=lambda path: path.stem)
def test_a_recipe_of_scale_runs_in_its_smoke_form(recipe, run):
    report = run(recipe, f"model={TINY}", *QUICKER.get(recipe.stem, ()))
    assert any("random" in note for note in report["notes"])
    assert "perplexity" not in report["arms"]["optimized"]["metrics"]
    assert report["arms"]["optimized"]["metrics"]["tpot_ms"]["value"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in WORKLOADS if path.stem.endswith("-composed")], ids=lambda path: path.stem)
def test_a_composition_for_another_task_trains_its_network_and_reports(recipe, run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    network = next(iter(yaml.safe_load(recipe.with_name(recipe.name.replace("-composed", "")).read_text())["model"]))
    steps = yaml.safe_load(recipe.read_text())["transforms"]
    healing = next(place for place, step in enumerate(steps) if "distill" in step)
    few = (f"model.{network}.training.steps=2", f"transforms.{healing}.distill.steps=2", "measure.latency.batch_sizes=[1]")
    report = run(recipe, *few, *FEW_ITEMS.get(recipe.stem, ()))
    compared = {entry["metric"]: entry for entry in report["comparisons"] if entry["arm"] == "optimized"}
    assert {"artefact_bytes", "tpot_ms" if "tpot_ms" in compared else "latency_ms"} < compared.keys()
    assert compared["artefact_bytes"]["ratio"] < 0.9
    assert report["data"]["items"] > 50


@pytest.mark.slow
def test_the_recipe_of_few_shots_compares_answers_in_pairs(run):
    report = run(RECIPES / "workloads" / "few-shot-int4.yaml", "task={few-shot: {items: 12}}")
    compared = {entry["metric"] for entry in report["comparisons"] if entry["arm"] == "optimized"}
    assert {"accuracy_0_shot", "accuracy_1_shot", "accuracy_4_shot"} <= compared
    assert "agreement" in report["arms"]["optimized"]["metrics"]


@pytest.mark.parametrize("recipe", WORKLOADS, ids=lambda path: path.stem)
def test_a_recipe_of_another_task_is_checked_whole(recipe):
    assert check_recipe(load_recipe(recipe), str(recipe)).outline.module is not None


@pytest.mark.parametrize("recipe", [*SMALL, *SCALE, *WORKLOADS], ids=lambda path: path.stem)
def test_a_shipped_recipe_is_short(recipe):
    assert len(recipe.read_text().splitlines()) <= 25
