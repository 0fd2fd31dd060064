"""Every shipped recipe is run, the large ones in their smoke form: the same transforms on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = sorted(RECIPES.glob("*.yaml"))
SCALE = sorted((RECIPES / "scale").glob("*.yaml"))
SHORT = ["threads=1", "measure.latency.seconds=1", "measure.latency.new_tokens=10", "measure.latency.prompt_tokens=16"]
QUICKER = {"qat-int4": ("transforms.0.qat.steps=2",), "mixed": ("transforms.0.mixed={layers: {'*': int8}}",)}
TEXTS = "optkit/harness/*.py"  # a small corpus: that of the standard library takes every process some seconds
TINY = "{shape: {layers: 2, hidden_size: 128, heads: 2, intermediate_size: 256, vocabulary: 512}}"


def run(recipe: Path, out: Path, *overrides: str) -> dict:
    sets = [part for override in (*SHORT, *overrides) for part in ("--set", override)]
    command = [sys.executable, "-m", "optkit", "run", str(recipe), "--quick", "--json", "--out", str(out), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=RECIPES.parent)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_and_reports(recipe, tmp_path):
    report = run(recipe, tmp_path, f"task={{language-modeling: {{corpus: {TEXTS}, tokens: 2048}}}}", *QUICKER.get(recipe.stem, ()))
    compared = {entry["metric"]: entry for entry in report["comparisons"] if entry["arm"] == "optimized"}
    assert {"tpot_ms", "ttft_ms", "perplexity", "artefact_bytes"} <= compared.keys()
    assert all(entry["verdict"] in ("better", "worse", "same", "unclear") for entry in compared.values())
    assert report["noise"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SCALE, ids=lambda path: path.stem)
def test_a_recipe_of_scale_runs_in_its_smoke_form(recipe, tmp_path):
    report = run(recipe, tmp_path, f"model={TINY}")
    assert any("random" in note for note in report["notes"])
    assert "perplexity" not in report["arms"]["optimized"]["metrics"]
    assert report["arms"]["optimized"]["metrics"]["tpot_ms"]["value"] > 0


@pytest.mark.parametrize("recipe", [*SMALL, *SCALE], ids=lambda path: path.stem)
def test_a_shipped_recipe_is_short(recipe):
    assert len(recipe.read_text().splitlines()) <= 25
