"""Recipe files: what is read, what they extend, and what an error looks like."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optkit.core.errors import ProblemsError
from optkit.recipe import Recipe, load_recipe

pytestmark = pytest.mark.usefixtures("stand_ins")


def write(folder: Path, **files: str) -> Path:
    """Write recipe files and return the path of the first."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def refusal(path: Path | str, *overrides: str) -> ProblemsError:
    with pytest.raises(ProblemsError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value


def only(path: Path | str) -> tuple[int, str, str]:
    (problem,) = refusal(path).problems
    return problem.line, problem.path, problem.message


def test_the_error_is_a_table_of_lines_places_and_remedies(tmp_path: Path) -> None:
    text = "name: mine\ntransforms:\n  - int4: {group_size: 96}\n  - in8\nmeasure:\n  latency: {new_tokens: sixteen}\n"
    path = write(tmp_path, mine=text)
    assert str(refusal(path)).splitlines() == [
        f"{path}: 3 problems",
        "  line 3    transforms[0].int4.group_size  expected one of 32, 64 or 128, got 96",
        "  line 4    transforms[1]                  unknown transform 'in8'; did you mean 'int8'?",
        "  line 6    measure.latency.new_tokens     expected a whole number, got 'sixteen'",
    ]


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, int8="name: int8")
    assert only(tmp_path / "int9.yaml") == (0, "", "does not exist; did you mean 'int8.yaml'?")
    assert only(tmp_path / "no" / "where.yaml") == (0, "", "does not exist")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert only(tmp_path)[2] == "is a folder; name the recipe in it"
    assert only(pipe)[2] == "is no regular file"
    assert only("/dev/zero")[2] == "is no regular file"
    assert only("a\0b.yaml")[2] == "is no name of a file"
    assert only("x" * 5000)[2].startswith("cannot be read: ")
    assert only(loop)[2].startswith("cannot be read: ")
    assert only(write(tmp_path, a="name: a") / "b.yaml")[2].startswith("cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, a="name: a")
    path.chmod(0)
    assert only(path)[2] == "cannot be read: permission denied"


def test_a_denied_file_is_refused_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, a="name: a")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert only(path)[2] == "cannot be read: permission denied"


def test_mappings_merge_and_lists_replace(tmp_path: Path) -> None:
    base = "name: base\nthreads: 2\ntransforms: [magnitude]\nlimits: {perplexity: 2}\n"
    base += "measure: {latency: {new_tokens: 8, seconds: 5}, quality: {}}\n"
    own = "extends: base.yaml\nname: own\ntransforms: [int8, int4]\nmeasure: {latency: {new_tokens: 16}}\nlimits: {tpot_ms: 1}\n"
    recipe: Any = load_recipe(write(tmp_path, own=own, base=base))
    assert (recipe.name, recipe.threads, len(recipe.transforms)) == ("own", 2, 2)
    assert (recipe.measure["latency"].new_tokens, recipe.measure["latency"].seconds) == (16, 5)
    assert list(recipe.measure) == ["latency", "quality"]
    assert recipe.limits == {"perplexity": 2, "tpot_ms": 1}


def test_extending_goes_on_from_the_file_that_says_it(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: parts/b.yaml\n", parts__b="extends: c.yaml\nthreads: 3\n", parts__c="name: c\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.threads) == ("c", 3)


def test_a_recipe_named_without_its_folder_can_extend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="extends: b.yaml\n", b="name: b\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("a.yaml").name == "b"


def test_a_fault_of_the_base_names_its_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, a="name: a\nextends: b.yaml\nseed: -1\n", b="# base\nthreads: 0\nmodel: *x\n")
    assert [(problem.line, problem.path, problem.message) for problem in refusal(path).problems] == [
        (2, "model", "alias *x is not allowed in a recipe; write the value out (b.yaml, line 3)"),
        (2, "threads", "must be at least 1, got 0 (b.yaml, line 2)"),
        (3, "seed", "must be at least 0, got -1"),
    ]


def test_what_replaces_a_fault_of_the_base_repairs_it(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, a="extends: b.yaml\nthreads: 1\n", b="name: b\nthreads: 0\n")).threads == 1


@pytest.mark.parametrize("base", ["/etc/passwd", "../b.yaml", "parts/../../b.yaml", "..\\b.yaml", "C:/b.yaml", "~/b.yaml", "\\\\host\\b"])
def test_a_base_outside_the_folder_is_refused(tmp_path: Path, base: str) -> None:
    line, path, message = only(write(tmp_path, a=f"name: a\nextends: '{base}'\n"))
    assert (line, path) == (2, "extends")
    assert "leads out of the recipe's folder" in message


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, outside="name: secret")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.yaml").symlink_to(tmp_path / "outside.yaml")
    (tmp_path / "inner" / "up").symlink_to(tmp_path)
    for base in ("b.yaml", "up/outside.yaml"):
        assert "is a link out of the recipe's folder" in only(write(tmp_path / "inner", a=f"name: a\nextends: {base}\n"))[2]


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: b.yaml\n", c="name: c\n")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "c.yaml")
    assert load_recipe(path).name == "c"


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("c.yaml", "'c.yaml' does not exist; did you mean 'b.yaml'?"),
        ("parts", "'parts' is a folder"),
        ("a.yaml", "a circle"),
        ("b.yaml", "'a.yaml' extends this recipe again: a circle; remove one 'extends' (b.yaml, line 1)"),
        ("[b.yaml]", "expected the name of a recipe file beside this one, got a list"),
        ("5", "got 5"),
        ("''", "got ''"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(tmp_path: Path, base: str, words: str) -> None:
    path = write(tmp_path, a=f"threads: 1\nextends: {base}\n", b="extends: a.yaml\n", parts__x="name: x\n")
    line, place, message = only(path)
    assert (line, place) == (2, "extends")
    assert words in message


def test_own_faults_are_reported_beside_a_lost_base(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: none.yaml\nthreads: 0\n")
    assert [problem.path for problem in refusal(path).problems] == ["extends", "threads"]


@pytest.mark.parametrize("text", ["a: [1", "- x", "", "name: \x00"])
def test_a_base_that_cannot_be_read_is_one_problem(tmp_path: Path, text: str) -> None:
    line, _, message = only(write(tmp_path, a="extends: b.yaml\n", b=text))
    assert line in (0, 1)
    assert "(b.yaml" in message


def test_eight_bases_are_enough(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path, **{f"r{number}": f"extends: r{number + 1}.yaml\n"})
    write(tmp_path, r12="name: deep\n")
    assert load_recipe(tmp_path / "r4.yaml").name == "deep"
    assert "more than 8 files extend one another" in only(tmp_path / "r3.yaml")[2]


def test_extends_without_a_value_is_not_written(read: Callable[..., Recipe]) -> None:
    assert read("name: a\nextends:\n").name == "a"


def test_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: b.yaml\nthreads: 2\n", b="name: b\nthreads: 1\nseed: 1\n")
    recipe = load_recipe(path, ["threads=4", "seed=5"])
    assert (recipe.threads, recipe.seed) == (4, 5)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, a="name: a\nthreads: 0\n")
    refusal(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.yaml"]
