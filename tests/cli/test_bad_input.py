"""Bad input of every kind: a plain sentence that names the culprit, exit code 2 (4 for the disk), and nothing written elsewhere."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optkit.core import files
from optkit.harness import checking

ROOT = Path(__file__).parents[2]
RUNS = "experiments/tiny/0001/"
BOMB = "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\nname: tiny\n"
DEEP = "name: tiny\nmodel: " + "[" * 500 + "]" * 500 + "\n"

Optkit = Callable[..., Any]
Recipe = Callable[..., Path]


def tree(folder: Path) -> dict[str, int]:
    """Return every file below the folder with its size, but for those in the run's own folder."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: size for name, size in found.items() if RUNS not in name}


BAD_RECIPES = {
    "an empty file": ("", "empty"),
    "a list": ("- name: tiny\n- model: reference\n", "got a list"),
    "a bomb": (BOMB, "anchor"),
    "a deep nest": (DEEP, "deep"),
    "a tag": ("name: !!python/object/apply:os.system ['touch owned']\n", "tag"),
    "a wrong type": ("name: tiny\nmodel: reference\nthreads: two\n", "threads"),
    "an unknown transform": ("name: tiny\ntransforms: [in8]\n", "did you mean 'int8'"),
    "an impossible order": ("name: tiny\ntransforms: [int8, magnitude]\n", "cannot follow int8"),
    "a name that leads out": ("name: ../tiny\n", "no '..'"),
    "a key twice": ("name: tiny\nname: tiny\n", "'name'"),
    "an unknown key": ("name: tiny\nlimit: {tpot_ms: 1}\n", "did you mean 'limits'"),
    "a folder that is not there": ("name: tiny\nmodel: ./nowhere\n", "does not exist"),
    "a file for a model": ("name: tiny\nmodel: ./tiny.yaml\n", "is a file"),
    "a NUL": ("name: tiny\n\x00", "line"),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("text", "named"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_refused_before_anything_is_written(optkit: Optkit, home: Path, command: str, text: str, named: str) -> None:
    (home / "tiny.yaml").write_text(text)
    said = optkit(command, "tiny.yaml")
    assert said.code == 2
    assert named in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(tree(home)) == ["tiny.yaml"]
    assert not (home / "experiments").exists()


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_file_is_named_with_its_nearest_neighbor(optkit: Optkit, home: Path, command: str) -> None:
    (home / "tiny.yaml").write_text("name: tiny\n")
    said = optkit(command, "tny.yaml")
    assert (said.code, said.out) == (2, "")
    assert "tny.yaml" in said.err
    assert "did you mean 'tiny.yaml'" in said.err
    folder = optkit(command, ".")
    assert folder.code == 2
    assert "is a folder" in folder.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transforms": [{"int4": {"group_size": 128}}]}, ["line ", "transforms[0].int4", "128", "64"]),
        ({"transforms": [{"int8": {"targets": {"include": ["nothing.*"]}}}]}, ["transforms[0].int8", "'nothing.*' matches none"]),
        ({"transforms": [{"drop_layers": {"count": 9}}]}, ["transforms[0].drop_layers", "3"]),
        ({"transforms": [{"data_parallel": {"size": 2}}]}, ["transforms[0].data_parallel", "batch_sizes"]),
        ({"transforms": [{"tensor_parallel": {"size": 4}}]}, ["transforms[0].tensor_parallel", "2 groups of heads", "use size 2"]),
        ({"transforms": [{"pipeline_parallel": {"size": 4}}]}, ["transforms[0].pipeline_parallel", "3 blocks", "4 stages"]),
        (
            {"transforms": [{"distill": {"ranks": 2}}, {"qat": {"ranks": 4}}]},
            ["trainings of one recipe share their processes", "[2, 4] ranks"],
        ),
        ({"limits": {"tpot_sm": 1.0}}, ["limits.tpot_sm", "did you mean 'tpot_ms'"]),
        (
            {"limits": {"tpot_sm": 1.0}, "transforms": [{"int4": {"group_size": 128}}]},
            ["2 problems", "limits.tpot_sm", "transforms[0].int4"],
        ),
    ],
    ids=["group size", "target", "layers", "ranks", "shards", "stages", "trainings", "limit", "two problems"],
)
def test_what_cannot_work_on_this_model_is_refused_before_a_weight_is_read(
    optkit: Optkit, recipe: Recipe, home: Path, changes: dict[str, Any], named: list[str]
) -> None:
    file = recipe(**changes)
    for command in ("check", "run"):
        said = optkit(command, file)
        assert (said.code, said.out) == (2, "")
        assert all(word in said.err for word in named), said.err
        assert "Traceback" not in said.err
    assert list(tree(home)) == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("broken", "named"), [("config.json", "has no config.json"), ("model.safetensors", "has no *.safetensors")], ids=["config", "weights"]
)
def test_a_model_folder_that_lacks_a_file_is_refused(optkit: Optkit, recipe: Recipe, model_folder: Path, broken: str, named: str) -> None:
    (model_folder / broken).unlink()
    said = optkit("run", recipe())
    assert said.code == 2
    assert named in said.err
    assert "Traceback" not in said.err


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def starve(folder: Path) -> None:
    (folder.parent / "words.txt").write_text("\n\n")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (truncate, "cannot be opened"),
        (poison, "has NaN or infinite weights in 1 tensors, the first is model.norm.weight"),
        (starve, "empty"),
    ],
    ids=["truncated", "NaN", "no text"],
)
def test_weights_and_texts_that_cannot_be_used_are_refused_and_nothing_is_written_elsewhere(
    optkit: Optkit, recipe: Recipe, home: Path, model_folder: Path, harm: Callable[[Path], None], named: str
) -> None:
    file = recipe()
    harm(model_folder)
    before = tree(home.parent)
    said = optkit("run", file)
    assert (said.code, said.out) == (2, "")
    assert named in said.err
    assert "Traceback" not in said.err
    assert tree(home.parent) == before
    assert not files.is_sealed(home / RUNS)


def test_a_model_of_the_hub_that_cannot_be_reached_is_missing(optkit: Optkit, recipe: Recipe, home: Path) -> None:
    said = optkit("run", recipe(model="nobody/nothing"))
    assert said.code == 3
    assert "Hub cannot be reached" in said.err
    assert "Traceback" not in said.err
    assert list(tree(home)) == ["tiny.yaml"]


def test_a_run_that_would_not_fit_on_the_disk_is_refused_with_both_numbers(
    optkit: Optkit, recipe: Recipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_SPARE_BYTES", 10**18)
    said = optkit("run", recipe())
    assert said.code == 4
    assert "the run needs about 1000000000.00 GB in experiments, and" in said.err
    assert list(tree(home)) == ["tiny.yaml"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no process write a file of more than 100 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_half_way_ends_the_run_without_a_result(optkit: Optkit, recipe: Recipe, home: Path, small_files: None) -> None:
    said = optkit("run", recipe())
    assert said.code == 4, said.err
    assert "cannot write" in said.err
    assert "the file would be larger than allowed" in said.err
    assert "Traceback" not in said.err
    assert [path for path in home.rglob("*.safetensors") if not path.parent.name.startswith(".")] == []
    assert not files.is_sealed(home / RUNS)


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk; the limit on files stands for it")
    yield from mounted(tmp_path / "small", "size=200k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that this user cannot write to; root can write anywhere but on a read-only file system."""
    if os.geteuid() == 0:
        yield from mounted(tmp_path / "fixed", "ro,size=1g")
    else:
        (tmp_path / "fixed").mkdir(mode=0o555)
        yield tmp_path / "fixed"


def test_a_small_disk_ends_the_run_without_a_result(
    optkit: Optkit, recipe: Recipe, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_SPARE_BYTES", -(10**9))  # or the forecast would refuse it
    said = optkit("run", recipe(), "--out", small_disk)
    assert said.code == 4, said.err
    assert "the disk is full" in said.err
    assert "Traceback" not in said.err
    assert [path for path in small_disk.rglob("*.safetensors") if not path.parent.name.startswith(".")] == []


def test_a_folder_of_experiments_that_is_read_only_is_refused(optkit: Optkit, recipe: Recipe, home: Path, read_only: Path) -> None:
    said = optkit("run", recipe(), "--out", read_only)
    assert said.code == 2
    assert "read-only" in said.err or "permission denied" in said.err
    assert "choose another folder with --out" in said.err
    assert "Traceback" not in said.err
    assert list(tree(home)) == ["tiny.yaml"]


def test_a_file_in_the_place_of_the_folder_of_experiments_is_refused(optkit: Optkit, recipe: Recipe, home: Path) -> None:
    said = optkit("run", recipe(), "--out", "tiny.yaml")
    assert said.code == 2
    assert "a file is in the way" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "./nowhere"}, "line 2"),
        ({"task": {"language-modeling": {"corpus": {"files": ["notes/*.txt"]}}}}, "'notes/*.txt' matches no file"),
    ],
    ids=["model", "texts"],
)
def test_check_finds_what_is_not_there_and_run_leaves_nothing(
    optkit: Optkit, recipe: Recipe, home: Path, changes: dict[str, Any], named: str
) -> None:
    for command in ("check", "run"):
        said = optkit(command, recipe(**changes))
        assert said.code == 2
        assert named in said.err
        assert "Traceback" not in said.err
    assert list(tree(home)) == ["tiny.yaml"]


def test_an_unknown_choice_of_kernels_is_found_by_check(optkit: Optkit, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_KERNELS", "nonsense")
    said = optkit("check", recipe())
    assert said.code == 2
    assert "OPTKIT_KERNELS is 'nonsense'" in said.err


def test_a_name_that_is_too_long_is_said_to_be(optkit: Optkit, recipe: Recipe) -> None:
    for words in (["run", recipe(), "--out", "x" * 300], ["verify", "x" * 5000], ["compare", "x" * 5000]):
        said = optkit(*words)
        assert said.code == 2
        assert "the name is too long" in said.err


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&-"])
def test_a_refusal_keeps_its_exit_code_where_nobody_can_read_it(closed: str) -> None:
    done = subprocess.run(f"{sys.executable} -m optkit check nowhere.yaml {closed}", shell=True, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2


def test_there_must_be_something_to_resume(optkit: Optkit, recipe: Recipe, home: Path) -> None:
    said = optkit("run", recipe(), "--resume")
    assert said.code == 2
    assert "has no unfinished run; leave --resume out" in said.err
    assert list(tree(home)) == ["tiny.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "tiny.yaml", "--fast"],
        ["measure", "tiny.yaml"],
        ["verify"],
        ["compare", "x", "--csv", "--json"],
        ["run", "tiny.yaml", "--set", "threads"],
        ["run", "tiny.yaml", "--set", "threads=many"],
        ["run", "tiny.yaml", "--set", "thread=1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(optkit: Optkit, recipe: Recipe, home: Path, words: list[str]) -> None:
    recipe()
    said = optkit(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.strip()
    assert "Traceback" not in said.err
    assert list(tree(home)) == ["tiny.yaml"]
