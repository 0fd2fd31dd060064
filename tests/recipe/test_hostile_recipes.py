"""Any bytes at all give a recipe or a list of problems, and nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.core.errors import ProblemsError
from optkit.recipe import Recipe, load_recipe, recipe_from_dict
from optkit.recipe.trail import LONGEST_SHOWN

pytestmark = pytest.mark.usefixtures("stand_ins")

VALID = """\
name: shorter-int4
model: reference
baseline: {dtype: float32}
threads: 2
task: {language-modeling: {corpus: python}}
transforms:
  - magnitude: {sparsity: 0.2}
  - int4: {group_size: 64, targets: {exclude: [lm_head]}}
measure:
  latency: {prompt_tokens: 128, new_tokens: 64, batch_sizes: [1]}
  memory: {}
limits: {perplexity: 1.05, tpot_ms: 6e-1}
"""
PIECES = ["name", "model", "shape:", "transforms", "int4", "int8", "group_size", "targets", "measure", "latency", "task", "limits"]
PIECES += ["extends", ": ", ":", "\n", "\n  ", "- ", "{", "}", "[", "]", ",", "&a ", "*a", "!!python/object ", "<<", "'", '"', "|\n"]
PIECES += [">\n", "? ", "#", "%YAML 1.1\n", "---\n", "...\n", "1e-5", "012", "9" * 30, "null", "~", "true", "no", "../", "\t", "\\x"]
PIECES += ["\r", "\x00", "\x85", "\ufeff", "é", "\\U00110000"]

examples = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], print_blob=True
)
words = st.sampled_from(PIECES) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(PIECES) | st.text(max_size=20)
names = st.sampled_from(PIECES) | st.text(max_size=5)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=20)
steps = st.sampled_from([*PIECES, "0", "1", ".", "[0]", "[", "]"])
keys = st.sampled_from([*Recipe.model_fields, "extends"])


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "recipe.yaml"


def judge(path: Path, raw: bytes, *overrides: str) -> None:
    """Read the bytes: a recipe that survives its own text, or problems that can be printed on a terminal."""
    path.write_bytes(raw)
    try:
        recipe = load_recipe(path, overrides)
    except ProblemsError as error:
        assert error.problems
        for problem in error.problems:
            line = f"{problem.path}{problem.message}"
            assert line.isprintable(), line
            assert len(problem.message) < 20 * LONGEST_SHOWN
            assert 0 <= problem.line <= raw.count(b"\n") + raw.count(b"\r") + 2
        return
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


@examples
@given(raw=st.binary(max_size=200))
def test_random_bytes(place: Path, raw: bytes) -> None:
    judge(place, raw)


@examples
@given(pieces=st.lists(words, max_size=40))
def test_random_documents_of_yaml_pieces(place: Path, pieces: list[str]) -> None:
    judge(place, "".join(pieces).encode("utf-8", "surrogatepass"))


@examples
@given(at=st.integers(0, len(VALID)), cut=st.integers(0, 30), piece=st.lists(words, max_size=4).map("".join))
def test_mutations_of_a_valid_recipe(place: Path, at: int, cut: int, piece: str) -> None:
    judge(place, (VALID[:at] + piece + VALID[at + cut :]).encode("utf-8", "surrogatepass"))


@examples
@given(data=st.dictionaries(keys, trees, max_size=6))
def test_random_values_for_the_keys_of_a_recipe(place: Path, data: dict[str, Any]) -> None:
    judge(place, json.dumps({"name": "a", **data}).encode())


@examples
@given(data=st.dictionaries(keys, trees, max_size=6))
def test_random_data_from_python(data: dict[str, Any]) -> None:
    try:
        assert recipe_from_dict(data).name == data["name"]
    except ProblemsError as error:
        assert error.problems


@examples
@given(path=st.lists(steps, max_size=6).map("".join), value=st.lists(words, max_size=5).map("".join))
def test_random_overrides(place: Path, path: str, value: str) -> None:
    judge(place, VALID.encode(), f"{path}={value}")
    judge(place, VALID.encode(), f"transforms[1].int4.{path}={value}", f"measure.{path}={value}")


def test_a_hundred_megabytes_are_not_read(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ProblemsError, match="larger than 1,000,000 bytes"):
        load_recipe(place)


def test_nothing_in_a_recipe_runs(place: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    call = f"!!python/object/apply:pathlib.Path.touch [{canary}]"
    for text in (f"name: a\nthreads: {call}\n", f"{call}: a\n", f"name: a\ntransforms: [{call}]\n", f"name: $(touch {canary})\n"):
        place.write_text(text)
        with pytest.raises(ProblemsError):
            load_recipe(place)
    assert not canary.exists()
