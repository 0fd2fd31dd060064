"""Names, settings and their faults, in our own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optkit.models.shapes import Shape

Findings = Callable[..., list[tuple[int, str, str]]]
Message = Callable[..., str]


def test_a_recipe_keeps_real_objects(read: Callable[..., Any], stand_ins: Any) -> None:
    recipe = read(
        "name: a\nthreads: 2\ntransforms:\n"
        "  - magnitude: {sparsity: 1e-1, targets: {include: ['*.q', up]}}\n  - int4\n  - dtype: {dtype: bfloat16}\n"
        "task: {language-modeling: {tokens: 4096}}\n"
        "measure: {latency: {batch_sizes: [1, 8], seconds: 5}, quality: }\nlimits: {tpot_ms@8: 1}\n"
    )
    magnitude, int4, dtype = recipe.transforms
    assert isinstance(magnitude, stand_ins["magnitude"])
    assert magnitude.sparsity == 0.1
    assert magnitude.targets.include == ("*.q", "up")
    assert int4 == stand_ins["int4"](group_size=64)
    assert dtype.dtype == "bfloat16"
    assert recipe.task.tokens == 4096
    assert recipe.measure["latency"].batch_sizes == (1, 8)
    assert recipe.measure["latency"].seconds == 5.0
    assert list(recipe.measure) == ["latency", "quality"]
    assert recipe.limits == {"tpot_ms@8": 1.0}


def test_a_name_alone_is_a_whole_recipe(read: Callable[..., Any]) -> None:
    recipe = read("name: a\n")
    assert (recipe.model, recipe.seed, recipe.transforms) == ("reference", 0, ())
    assert (recipe.baseline, recipe.threads, recipe.task, recipe.description) == (None, None, None, None)
    assert list(recipe.measure) == ["latency", "memory", "quality"]


def test_keys_without_a_value_count_as_not_written(read: Callable[..., Any]) -> None:
    written = "name: a\nmodel:\nbaseline: ~\nthreads: null\nseed:\ntask:\ntransforms:\nmeasure:\nlimits:\ndescription:\n"
    assert read(written) == read("name: a\n")


@pytest.mark.parametrize("model", ["reference", "shape:llama-1b", "./mine", "/data/mine", "owner/name", "../up", "~/m", ".", "a/b/c"])
def test_a_model_can_be_written_in_every_form(read: Callable[..., Any], model: str) -> None:
    assert read(f"name: a\nmodel: {model}\n").model == model


def test_a_folder_here_needs_no_dot(read: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert read("name: a\nmodel: mine\n").model == "mine"


def test_a_free_shape_is_read(read: Callable[..., Any]) -> None:
    recipe = read("name: a\nmodel: {shape: {layers: 2, hidden_size: 64, heads: 4, vocabulary: 100}}\n")
    assert recipe.model == Shape(layers=2, hidden_size=64, heads=4, vocabulary=100)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("model: refrence", "model", "unknown model 'refrence'; did you mean 'reference'?"),
        ("model: llama-1b", "model", "unknown model 'llama-1b'; did you mean 'shape:llama-1b'?"),
        ("model: zzz", "model", "unknown model 'zzz'; use 'reference'"),
        (f"model: {'z' * 5000}", "model", "unknown model"),
        ("model: shape:llama-1bn", "model", "unknown shape 'llama-1bn'; did you mean 'llama-1b'?"),
        ("model: ''", "model", "'' is no model"),
        ('model: "a\\nb/c"', "model", r"'a\nb/c' is no model"),
        ("model: 5", "model", "got 5"),
        ("model: [a]", "model", "got a list"),
        ("model: {}", "model", "got an empty mapping"),
        ("model: {path: x}", "model", "got the keys 'path'"),
        ("model: {shape: llama-1b}", "model.shape", "got 'llama-1b'; a named one is 'shape:NAME'"),
        (
            "model: {shape: {layers: 2, hiden_size: 4, hidden_size: 8, heads: 2, vocabulary: 9}}",
            "model.shape.hiden_size",
            "did you mean 'hidden_size'?",
        ),
        ("transforms: [in8]", "transforms[0]", "unknown transform 'in8'; did you mean 'int8'?"),
        ("transforms: [{in8: {}}]", "transforms[0]", "unknown transform 'in8'; did you mean 'int8'?"),
        (f"transforms: [{'q' * 5000}]", "transforms[0]", "unknown transform"),
        ("transforms: int8", "transforms", "expected a list, each entry with '-' in front, got 'int8'"),
        ("transforms: {int8: {}}", "transforms", "got a mapping"),
        ("transforms: [5]", "transforms[0]", "expected the name of a transform or {name: {settings}}, got 5"),
        ("transforms: [~]", "transforms[0]", "got nothing"),
        ("transforms: [[int8]]", "transforms[0]", "got a list"),
        ("transforms: [{int4: , group_size: 32}]", "transforms[0]", "got 2 keys ('int4', 'group_size'); indent settings below the name"),
        ("transforms: [{int4: 32}]", "transforms[0].int4", "expected a mapping of settings, got 32"),
        ("transforms: [{int4: {group_size: 96}}]", "transforms[0].int4.group_size", "expected one of 32, 64 or 128, got 96"),
        ("transforms: [{int4: {group_size: '64'}}]", "transforms[0].int4.group_size", "expected one of 32, 64 or 128, got '64'"),
        ("transforms: [{int4: {head: no}}]", "transforms[0].int4.head", "expected true or false, got 'no'"),
        (
            "transforms: [{int8: {targets: {exlude: [a]}}}]",
            "transforms[0].int8.targets.exlude",
            "unknown key 'exlude'; did you mean 'exclude'?",
        ),
        ("transforms: [{int8: {targets: {exclude: a}}}]", "transforms[0].int8.targets.exclude", "expected a list, got 'a'"),
        (
            "transforms: [{int8: {targets: {exclude: [a, 1]}}}]",
            "transforms[0].int8.targets.exclude[1]",
            "expected text, got 1; put it in quotes",
        ),
        ("transforms: [{int8: {targets: [a]}}]", "transforms[0].int8.targets", "expected a mapping, got a list"),
        ("transforms: [dtype]", "transforms[0].dtype", "is missing (type to store in); add it"),
        ("transforms: [{dtype: {dtype: bf16}}]", "transforms[0].dtype.dtype", "got 'bf16'; did you mean 'bfloat16'?"),
        ("transforms: [{magnitude: {sparsity: 1}}]", "transforms[0].magnitude.sparsity", "must be less than 1, got 1"),
        (
            "transforms: [{magnitude: {sparsity: '0.5'}}]",
            "transforms[0].magnitude.sparsity",
            "expected a number, got '0.5'; remove the quotes",
        ),
        ("transforms: [{magnitude: {sparsity: true}}]", "transforms[0].magnitude.sparsity", "expected a number, got true"),
        ("transforms: [{magnitude: {sparsity: .nan}}]", "transforms[0].magnitude.sparsity", "expected a number, got '.nan'"),
        ("transforms: [{drop_layers: {count: 2, layers: [1]}}]", "transforms[0].drop_layers", "give count or layers, not both"),
        ("transforms: [{drop_layers: {count: 1.0}}]", "transforms[0].drop_layers.count", "expected a whole number, got 1.0"),
        ("transforms: [lost_plugin]", "transforms[0]", "transform 'lost_plugin' cannot be loaded: No module named 'lost'"),
        (
            "transforms: [data_parallel, int8]",
            "transforms[1]",
            "int8 (quantize) cannot follow data_parallel (parallel); the order is merge, prune, factorize",
        ),
        ("measure: [latency]", "measure", "got a list"),
        ("measure: {}", "measure", "names no meter; leave it out for latency, memory, quality"),
        ("measure: {memry: {}}", "measure.memry", "unknown meter 'memry'; did you mean 'memory'?"),
        ("measure: {latency: {new_tokens: sixteen}}", "measure.latency.new_tokens", "expected a whole number, got 'sixteen'"),
        ("measure: {latency: {batch_sizes: []}}", "measure.latency.batch_sizes", "needs at least 1 entries, got 0"),
        ("measure: {latency: {batch_sizes: [1, 0]}}", "measure.latency.batch_sizes[1]", "must be at least 1, got 0"),
        ("task: langage-modeling", "task", "unknown task 'langage-modeling'; did you mean 'language-modeling'?"),
        ("task: {language-modeling: {corpus: 5}}", "task.language-modeling.corpus", "expected text or a mapping, got 5"),
        ("task: {language-modeling: {corpus: {hub: a, spilt: b}}}", "task.language-modeling.corpus.spilt", "did you mean 'split'?"),
        ("task: {language-modeling: {corpus: {files: [1]}}}", "task.language-modeling.corpus.files[0]", "expected text, got 1"),
        ("baseline: {dtype: int8}", "baseline.dtype", "expected one of 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ("baseline: float32", "baseline", "expected a mapping, got 'float32'"),
        ("baseline: {}", "baseline.dtype", "is missing"),
        ("threads: 0", "threads", "must be at least 1, got 0"),
        ("threads: true", "threads", "expected a whole number, got true"),
        ("threads: '2'", "threads", "expected a whole number, got '2'; remove the quotes"),
        ("seed: -1", "seed", "must be at least 0, got -1"),
        ("seed: 1.5", "seed", "expected a whole number, got 1.5"),
        ("limits: {tpot_ms: 0}", "limits.tpot_ms", "must be more than 0, got 0"),
        ("limits: {'../x': 1}", "limits['../x']", "is no name of a metric"),
        ("limits: [1]", "limits", "expected a mapping, got a list"),
        ("description: 5", "description", "expected text, got 5; put it in quotes"),
        ("colour: red", "colour", "unknown key 'colour'"),
        ("transform: [int8]", "transform", "unknown key 'transform'; did you mean 'transforms'?"),
    ],
)
def test_a_fault_names_place_culprit_and_remedy(problems: Findings, text: str, place: str, words: str) -> None:
    found = problems(f"name: a\n{text}\n")
    assert len(found) == 1, found
    line, path, message = found[0]
    assert (line, path) == (2, place)
    assert words in message
    assert len(message) < 400


@pytest.mark.parametrize("name", ["../mine", "a/b", "a\\\\b", ".hidden", "a..b", "..", "-rf", "a b", "é", "", "a\\n", "x" * 65, "CON:"])
def test_a_name_that_is_no_folder_name_is_refused(message: Message, name: str) -> None:
    assert "name" in message(f'name: "{name}"\n')


@pytest.mark.parametrize("name", ["a", "_x", "int8", "qwen2.5-0.5b-int8", "x" * 64, "0"])
def test_a_plain_name_is_accepted(read: Callable[..., Any], name: str) -> None:
    assert read(f"name: '{name}'\n").name == name


def test_a_number_as_name_is_told_to_use_quotes(message: Message) -> None:
    assert message("name: 5\n") == "expected text, got 5; put it in quotes"


def test_a_missing_name_is_said(problems: Findings) -> None:
    assert problems("model: reference\n") == [(0, "name", "is missing (name of the recipe and of its folder of results); add it")]


def test_the_order_is_checked_among_what_is_right(problems: Findings) -> None:
    found = problems("name: a\ntransforms:\n  - int8\n  - in4\n  - magnitude\n")
    assert [(line, path) for line, path, _ in found] == [(4, "transforms[1]"), (5, "transforms[2]")]
    assert "magnitude (prune) cannot follow int8 (quantize)" in found[1][2]


def test_all_problems_come_at_once_in_the_order_of_their_lines(problems: Findings) -> None:
    text = (
        "name: ../a\nmodel: &m refrence\nthreads: 0\ntransforms:\n  - int4: {group_size: 96, gruop: 1}\n  - in8\nthreads: 2\n"
        "measure:\n  latency: {new_tokens: sixteen}\nseed: !x 5\nlimits: {tpot_ms: -1}\n"
    )
    assert [line for line, _, _ in problems(text)] == [1, 2, 2, 3, 5, 5, 6, 7, 9, 10, 11]


def test_a_lost_value_is_reported_once(problems: Findings) -> None:
    found = problems("name: *a\ntransforms: [{int4: {group_size: *b}}]\n")
    assert [path for _, path, _ in found] == ["name", "transforms[0].int4.group_size"]


def test_thousands_of_problems_are_cut(problems: Findings) -> None:
    found = problems("name: a\n" + "".join(f"key{number}: 1\n" for number in range(4000)))
    assert len(found) <= 52
    text = "name: a\n" + "".join(f"k{number}: *x\n" for number in range(3000))
    found = problems(text)
    assert len(found) == 51
    assert found[-1][2].endswith("more problems")
