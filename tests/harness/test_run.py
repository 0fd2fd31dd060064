"""Whole runs of tiny models: what a report holds, what a folder holds, and what a run refuses before it begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import HERE, classifier_recipe

import optkit
from optkit.core import files
from optkit.core.errors import OptkitError, ProblemsError
from optkit.harness import stages
from optkit.harness.folder import RunFolder
from optkit.harness.inputs import inputs_of, quickened
from optkit.models.artefact import MANIFEST
from optkit.models.sources import open_model
from optkit.recipe.reading import load_recipe, recipe_from_dict
from optkit.transforms import Int8

TIMES = {
    "ttft_ms",
    "tpot_ms",
    "itl_p50_ms",
    "itl_p90_ms",
    "itl_p99_ms",
    "tokens_per_second",
    "cache_bytes",
}  # of each batch size
QUALITY = {"perplexity", "bits_per_byte", "token_accuracy"}
FIDELITY = {"kl_divergence", "top1_agreement", "greedy_match"}
COUNTED = {"peak_memory_bytes", "artefact_bytes", "weight_bytes_per_token"}
LOGITS = """
import sys, torch, optkit
subject = optkit.load(sys.argv[1])
with torch.inference_mode():
    torch.save(subject.module(input_ids=torch.arange(24)[None]).logits, sys.argv[2])
"""


def test_the_printed_json_is_the_report_and_nothing_else(finished: Any) -> None:
    folder, printed = finished
    assert printed == json.loads((folder / "report.json").read_text())


def test_a_report_has_every_metric_of_every_arm_with_its_samples(finished: Any) -> None:
    _, report = finished
    assert list(report["arms"]) == ["baseline", "optimized", "bfloat16"]
    assert report["arms"]["baseline"]["metrics"].keys() == TIMES | QUALITY | COUNTED | {"read_bandwidth", "roof_share"}
    assert report["arms"]["optimized"]["metrics"].keys() == TIMES | QUALITY | FIDELITY | COUNTED | {"read_bandwidth", "roof_share"}
    for arm in report["arms"].values():
        assert arm["metrics"].keys() >= TIMES | QUALITY | COUNTED
        for name, metric in arm["metrics"].items():
            assert metric.keys() >= {"value", "unit", "samples", "higher_is_better"}
            assert metric["samples"], name
            assert metric["value"] is not None and metric["value"] >= 0, name
    rising = {name for name, metric in report["arms"]["optimized"]["metrics"].items() if metric["higher_is_better"]}
    assert rising == {"tokens_per_second", "token_accuracy", "top1_agreement", "greedy_match", "read_bandwidth", "roof_share"}


def test_a_comparison_is_after_by_before_with_an_interval_and_a_verdict(finished: Any) -> None:
    _, report = finished
    mine = {entry["metric"]: entry for entry in report["comparisons"] if entry["arm"] == "optimized"}
    assert mine.keys() == TIMES | QUALITY | COUNTED
    for name, entry in mine.items():
        before, after = (report["arms"][arm]["metrics"][name]["value"] for arm in ("baseline", "optimized"))
        assert (entry["before"], entry["after"]) == (before, after)
        assert entry["ratio"] == pytest.approx(after / before)
        assert entry["low"] <= entry["ratio"] * (1 + 1e-12)
        assert entry["high"] is None or entry["ratio"] <= entry["high"] * (1 + 1e-12)  # null: few hits, and an open interval
        assert entry["verdict"] in ("better", "worse", "same", "unclear")
    assert mine["artefact_bytes"]["verdict"] == "better"
    assert {entry["metric"] for entry in report["comparisons"] if entry["arm"] == "bfloat16"} == TIMES | QUALITY | COUNTED


def test_noise_is_the_baseline_against_itself(finished: Any) -> None:
    _, report = finished
    assert {entry["metric"] for entry in report["noise"]} >= TIMES
    assert {entry["arm"] for entry in report["noise"]} == {"baseline-again"}
    for entry in report["noise"]:
        assert entry["before"] == report["arms"]["baseline"]["metrics"][entry["metric"]]["value"]


def test_a_report_says_what_ran_and_on_what(finished: Any) -> None:
    folder, report = finished
    assert report["run"]["id"] == folder.name
    assert report["run"]["command"].startswith("optkit run ")
    assert "known within" in report["run"]["stopped_because"]
    assert report["environment"]["threads"] == 1
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert report["data"]["items"] > 0
    assert [step["name"] for step in report["arms"]["optimized"]["history"]] == ["int8"]
    assert report["arms"]["optimized"]["execution"] == "real"
    assert report["arms"]["baseline"]["history"] == []
    assert [(limit["metric"], limit["held"]) for limit in report["limits"]] == [("artefact_bytes", True), ("perplexity", True)]


def test_a_finished_folder_is_sealed_and_holds_no_work(finished: Any) -> None:
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"recipe.yaml", "report.json", "samples.csv", "table.md", "report.html", "artefact", "manifest.json"}
    listed = files.verify(folder)["files"]
    assert listed.keys() == names - {"artefact", "manifest.json"}
    files.verify(folder / "artefact", MANIFEST)
    assert load_recipe(folder / "recipe.yaml").name == "tiny"


def test_the_kept_artefact_opens_in_another_process_with_equal_logits(finished: Any, llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = finished
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, str(folder / "artefact"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    optimized = Int8().apply(open_model(str(llama_folder)).module)
    with torch.inference_mode():
        expected = optimized(input_ids=torch.arange(24)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_a_finished_run_is_read_back_as_a_table(finished: Any) -> None:
    folder, _ = finished
    assert len(optkit.load_reports([folder])) > 0


def test_random_weights_are_timed_but_not_judged_and_each_batch_size_has_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Any
) -> None:
    monkeypatch.setattr(stages, "_REFERENCES", ())
    shape = {"layers": 2, "hidden_size": 64, "heads": 2, "intermediate_size": 128, "vocabulary": 96}
    latency = {"prompt_tokens": 4, "new_tokens": 4, "seconds": 0.3, "precision": 0.5, "batch_sizes": [1, 3]}
    told: list[str] = []
    report = optkit.run(
        tiny_recipe(model={"shape": shape}, task=None, transforms=[], measure={"latency": latency, "memory": {}, "quality": {}})
        | {"limits": {"artefact_bytes": 1.0, "perplexity": 1.05, "tokens_per_second@3": 1e-6, "ttft_ms": 1e-6}},
        out=tmp_path,
        progress=lambda doing, share: told.append(doing),
    )
    metrics = report.arms["optimized"].metrics
    assert metrics.keys() >= TIMES | {f"{name}@3" for name in TIMES} | COUNTED
    assert not metrics.keys() & (QUALITY | FIDELITY)
    assert report.data is None
    assert "quality is withheld: the weights are random" in report.notes
    assert any("limits on metrics that were not measured do not hold: perplexity" in note for note in report.notes)
    assert {limit.metric: limit.held for limit in report.limits} == {
        "artefact_bytes": True,
        "perplexity": False,
        "tokens_per_second@3": True,  # more is better: a lower bound
        "ttft_ms": False,
    }
    assert not report.held
    assert {"checking the recipe", "opening optimized", "writing the report"} <= set(told)


def test_two_ranks_answer_like_one_and_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Any) -> None:
    monkeypatch.setattr(stages, "_REFERENCES", ())
    latency = {"prompt_tokens": 8, "new_tokens": 10, "seconds": 0.5, "batch_sizes": [2, 1]}  # then one rank has none of its own
    report = optkit.run(
        tiny_recipe(transforms=[{"data_parallel": {"size": 2}}], measure={"latency": latency, "memory": {}, "quality": {}}), out=tmp_path
    )
    before, after = report.arms["baseline"], report.arms["optimized"]
    assert (before.ranks, after.ranks) == (1, 2)
    assert after.metrics["greedy_match"].value == 1
    assert after.metrics["top1_agreement"].value == 1
    assert after.metrics["perplexity"].samples == pytest.approx(before.metrics["perplexity"].samples, rel=1e-5)
    assert after.metrics.keys() >= TIMES | {f"{name}@2" for name in TIMES} | COUNTED
    assert all(after.metrics[name].value == before.metrics[name].value for name in ("cache_bytes", "cache_bytes@2"))
    assert after.metrics["peak_memory_bytes"].detail["ranks"] == 2
    one, two = (arm.metrics["peak_memory_bytes"].value for arm in (before, after))
    assert one is not None
    assert two is not None
    assert 1.5 * one < two < 3 * one


def test_a_quantized_cache_is_counted_at_the_end_of_a_request_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Any
) -> None:
    monkeypatch.setattr(stages, "_REFERENCES", ())
    report = optkit.run(tiny_recipe(transforms=[{"kv_cache": {"bits": 4}}], limits={"cache_bytes": 0.2, "perplexity": 1.1}), out=tmp_path)
    before, after = report.arms["baseline"].metrics, report.arms["optimized"].metrics
    vectors = 2 * 3 * 2 * (8 + 10 - 1)  # keys and values, layers, heads, positions, of 16 channels each
    assert before["cache_bytes"].value == vectors * 16 * 4
    assert after["cache_bytes"].value == vectors * (16 / 2 + 2 * 2)
    assert after["cache_bytes"].detail == {"positions": 17, "bytes_per_position": 2 * 3 * 2 * 12}
    assert after["perplexity"].value != before["perplexity"].value
    assert after["artefact_bytes"].value == pytest.approx(before["artefact_bytes"].value, rel=0.01)
    assert any("kept in 4 bits" in note for note in report.arms["optimized"].notes)
    assert report.held


def test_a_workload_from_python_is_measured_item_by_item(tmp_path: Path) -> None:
    report = optkit.run(classifier_recipe(limits={"accuracy": 0.9, "latency_ms": 100}), out=tmp_path, workload="tiny_workloads:classifier")
    before, after = report.arms["baseline"].metrics, report.arms["optimized"].metrics
    assert before.keys() == {"latency_ms", "items_per_second", "accuracy", *COUNTED}
    assert len(after["accuracy"].samples) == 64
    assert 0.5 < (after["accuracy"].value or 0) <= 1
    compared = report.compared("optimized", "accuracy")
    assert compared is not None
    assert compared.ratio == pytest.approx(1, abs=0.1)
    assert report.held
    assert [step.name for step in report.arms["optimized"].history] == ["int8"]
    artefact = report.compared("optimized", "weight_bytes_per_token")
    assert artefact is not None
    assert (artefact.ratio or 1) < 0.35
    assert report.model.source == "tiny_workloads:classifier"


def test_a_score_that_is_not_a_number_reaches_the_report_as_null(tmp_path: Path) -> None:
    recipe = classifier_recipe(measure={"quality": {}}, transforms=[])
    report = optkit.run(recipe, out=tmp_path, workload="tiny_workloads:undefined")
    metric = report.arms["optimized"].metrics["accuracy"]
    assert metric.value is None
    assert 0 < metric.detail["not_finite"] < 64
    assert len(metric.samples) == 64 - metric.detail["not_finite"]
    compared = report.compared("optimized", "accuracy")
    assert compared is not None
    assert (compared.ratio, compared.verdict) == (None, "unclear")


@pytest.mark.parametrize(
    ("workload", "why"),
    [
        ("tiny_workloads:nothing", "cannot be imported"),
        ("no_such_module:classifier", "cannot be imported"),
        ("tiny_workloads", "give 'module:function'"),
        ("tiny_workloads:returns_nonsense", r"must return \(nn.Module"),
    ],
)
def test_a_workload_that_cannot_be_built_is_refused_before_a_folder_is_made(tmp_path: Path, workload: str, why: str) -> None:
    with pytest.raises(OptkitError, match=why):
        optkit.run(classifier_recipe(), out=tmp_path / "out", workload=workload)
    assert not (tmp_path / "out").exists()


def test_overrides_of_plain_data_are_refused_and_not_forgotten(tmp_path: Path, tiny_recipe: Any) -> None:
    with pytest.raises(OptkitError, match="overrides work on recipe files"):
        optkit.run(tiny_recipe(), out=tmp_path, overrides=("threads=2",))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"limits": {"perplexty": 1.1}}, "did you mean 'perplexity'"),
        ({"limits": {"tpot_ms@8": 1.1}}, "limits.tpot_ms@8"),
        ({"limits": {"kl_divergence": 1.1}}, "not compared with the baseline"),
        ({"limits": {"ttft_ms": 1.1}, "measure": {"quality": {}}}, "limits.ttft_ms"),
        ({"limits": {"perplexity": 1.1}, "measure": {"latency": {"prompt_tokens": 8, "new_tokens": 4}}}, "limits.perplexity"),
        ({"measure": {"memory": {}}}, "needs latency beside it"),
        ({"measure": {"latency": {"prompt_tokens": 60, "new_tokens": 10}}}, "make 70 positions together, and the model has 64"),
    ],
)
def test_what_cannot_be_measured_or_limited_is_refused_before_a_folder_is_made(
    tmp_path: Path, tiny_recipe: Any, changes: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ProblemsError, match=wrong):
        optkit.run(tiny_recipe(**changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_limits_of_a_workload_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="did you mean 'accuracy'"):
        optkit.run(classifier_recipe(limits={"acuracy": 0.9}), out=tmp_path / "out", workload="tiny_workloads:classifier")


@pytest.fixture
def begun(tiny_recipe: Any, tmp_path: Path) -> dict[str, Any]:
    """The recipe of an unfinished run in ``tmp_path``, on copies of model and corpus that a test may change."""
    recipe = tiny_recipe()
    (tmp_path / "model").mkdir()
    for file in Path(recipe["model"]).iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "words.txt").write_text("def x return y " * 500)
    recipe["model"] = str(tmp_path / "model")
    recipe["task"]["language-modeling"] |= {"corpus": str(tmp_path / "words.txt")}
    with RunFolder.new(tmp_path / "out" / "tiny", inputs_of(recipe_from_dict(recipe), False, False, None)):
        return recipe


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transforms": ["int4"]}, "recipe.transforms[0].int4.group_size"),
        ({"transforms": []}, "recipe.transforms"),
        ({"threads": 2}, "threads: 1 then, 2 now"),
        ({"seed": 7}, "recipe.seed: 0 then, 7 now"),
        ({"baseline": {"dtype": "bfloat16"}}, "recipe.baseline.dtype"),
    ],
)
def test_a_run_does_not_go_on_with_another_recipe(begun: dict[str, Any], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(OptkitError) as refused:
        optkit.run(begun | changes, out=tmp_path / "out", resume=True)
    assert named in str(refused.value)
    assert "model_sha256" not in str(refused.value)


@pytest.mark.parametrize(("file", "named"), [("model/generation_config.json", "model_sha256"), ("words.txt", "data_sha256")])
def test_a_run_does_not_go_on_with_another_model_or_other_data(begun: dict[str, Any], tmp_path: Path, file: str, named: str) -> None:
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text + " ")
    with pytest.raises(OptkitError, match=f"{named}: '[0-9a-f]+' then, '[0-9a-f]+' now") as refused:
        optkit.run(begun, out=tmp_path / "out", resume=True)
    assert len(str(refused.value).splitlines()) == 3


def test_a_run_does_not_go_on_on_another_machine_or_in_another_form(
    begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optkit.harness import inputs

    facts = inputs.environment()
    monkeypatch.setattr(inputs, "environment", lambda: facts | {"packages": facts["packages"] | {"torch": "1.0"}})
    with pytest.raises(OptkitError, match=r"environment\.packages\.torch"):
        optkit.run(begun, out=tmp_path / "out", resume=True)
    monkeypatch.undo()
    with pytest.raises(OptkitError, match="quick: False then, True now"):
        optkit.run(begun, out=tmp_path / "out", resume=True, quick=True)


def test_quick_only_ever_measures_less(tiny_recipe: Any) -> None:
    recipe = recipe_from_dict(tiny_recipe(task=None, measure={"latency": {"seconds": 90}, "memory": {}}))
    shorter: Any = quickened(recipe)
    assert shorter.measure["latency"].seconds == 10
    assert shorter.task.tokens == 8192
    small: Any = quickened(recipe_from_dict(tiny_recipe()))
    assert small.measure["latency"].seconds == 0.5
    assert small.task.tokens == 512


def test_a_corpus_without_text_leaves_no_result(tiny_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    recipe = tiny_recipe(task={"language-modeling": {"corpus": {"files": [str(tmp_path / "empty.txt")]}}})
    with pytest.raises(OptkitError, match="is empty"):
        optkit.run(recipe, out=tmp_path / "out")
    assert not list((tmp_path / "out" / "tiny").iterdir())
