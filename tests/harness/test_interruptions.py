"""Runs that are stopped at some moment: no process is left, nothing is half-written, and the run goes on to the same quality numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole_runs import Runs, classifier_recipe, workers_of

from optkit.report.record import Report

pytestmark = pytest.mark.slow
WORKLOAD = "tiny_workloads:slow_classifier"
MOMENTS = {  # what was finished last when a run is stopped, in the order of a run, and how it is stopped
    "inputs": signal.SIGKILL,
    "baseline": signal.SIGTERM,
    "optimized": signal.SIGHUP,
    "timing-1": signal.SIGINT,
    "quality-baseline": signal.SIGKILL,
}
CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
KILLS = int(os.environ.get("OPTKIT_KILLS", "3"))  # at random moments; more for a longer proof
SEED = 20


def quality(run: Path, *metrics: str) -> dict[str, Any]:
    """Return value and samples of the metrics in all arms."""
    report = Report.load(run)
    return {name: {key: (arm.metrics[key].value, arm.metrics[key].samples) for key in metrics} for name, arm in report.arms.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = Runs(tmp_path_factory.mktemp("undisturbed"), classifier_recipe(), WORKLOAD)
    return quality(runs.finish(), "accuracy")


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_quality(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    runs = Runs(tmp_path, classifier_recipe(), WORKLOAD)
    for moment, number in MOMENTS.items():
        process = runs.start(*options(runs))
        assert runs.reached(moment, process), process.communicate()
        code, said = runs.stop(process, number)
        assert code == CODES[number], said
        assert "Traceback" not in said
        if number != signal.SIGKILL:
            assert "what is finished is kept in" in said
            assert said.rstrip().endswith("--resume")
    folder = runs.finish("--resume")
    assert folder.name == "0001"
    assert not (folder / "work").exists()
    assert quality(folder, "accuracy") == undisturbed


def test_a_run_that_is_stopped_at_random_moments_ends_with_the_same_quality(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    draw = random.Random(SEED)
    runs = Runs(tmp_path, classifier_recipe(), WORKLOAD)
    for _ in range(KILLS):
        process = runs.start(*options(runs))
        try:
            process.wait(draw.uniform(0.2, 8))
        except subprocess.TimeoutExpired:
            runs.stop(process, draw.choice(list(CODES)))
        else:
            process.communicate()
    assert quality(runs.finish(*options(runs)), "accuracy") == undisturbed


def options(runs: Runs) -> list[str]:
    """Go on where there is something to go on with."""
    folder = runs.folder()
    return ["--resume"] if folder is not None and (folder / "work" / "inputs.json").exists() else []


def test_a_language_model_goes_on_after_a_kill_with_the_same_quality(tmp_path: Path, tiny_recipe: Any, finished: Any) -> None:
    recipe = tiny_recipe(baseline={"dtype": "float32"}, measure={"quality": {}})
    runs = Runs(tmp_path, recipe)
    process = runs.start()
    assert runs.reached("quality-baseline", process)
    before = time.time()
    runs.stop(process, signal.SIGKILL)
    folder = runs.folder()
    assert folder is not None
    kept = folder / "work" / "quality-baseline.json"
    assert kept.stat().st_mtime < before
    names = ("perplexity", "token_accuracy", "bits_per_byte")
    assert quality(runs.finish("--resume"), *names) == quality(finished[0], *names)


def test_a_rank_that_is_killed_ends_the_run_by_name_and_it_goes_on(tmp_path: Path, tiny_recipe: Any) -> None:
    latency = {"prompt_tokens": 8, "new_tokens": 10, "seconds": 1, "batch_sizes": [2]}
    runs = Runs(tmp_path, tiny_recipe(transforms=[{"tensor_parallel": {"size": 2}}], measure={"latency": latency, "quality": {}}))
    process = runs.start()
    assert runs.reached("left-out", process)
    found: list[psutil.Process] = []
    while not found and process.poll() is None:
        found = [one for one in map(psutil.Process, workers_of(process.pid)) if one.name() == "worker rank 1"]
    begun = time.monotonic()
    found[0].kill()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert process.returncode == 4  # as where the system kills for want of memory
    assert "rank 1" in said and "--resume" in said and "Traceback" not in said
    assert workers_of(process.pid, within_s=5) == []
    assert Report.load(runs.finish("--resume")).arms["optimized"].metrics["greedy_match"].value == 1


def test_runs_that_begin_at_once_in_one_folder_all_end_with_a_result(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    runs = Runs(tmp_path, classifier_recipe(measure={"quality": {}}), WORKLOAD)
    processes = [runs.start() for _ in range(2)]
    told = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    found = sorted((runs.out / "tiny").iterdir())
    assert [folder.name for folder in found] == ["0001", "0002"]
    assert all(quality(folder, "accuracy") == undisturbed for folder in found)


def test_a_second_run_does_not_resume_what_another_one_works_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path, classifier_recipe(), WORKLOAD)
    first = runs.start()
    assert runs.reached("inputs", first)
    first.send_signal(signal.SIGSTOP)  # on a busy machine it would be done before the second one begins
    second = runs.start("--resume")
    _, said = second.communicate(timeout=200)
    assert second.returncode == 2
    assert "being worked on by other processes" in said
    runs.stop(first, signal.SIGKILL)
