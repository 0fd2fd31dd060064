"""What the README says is done: its commands run, its code runs, its tree and its table are true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in re.findall(r"^    (.*python -m .*)$", README, re.M)]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TEXTS = f"task={{language-modeling: {{corpus: {ROOT}/optkit/harness/*.py, tokens: 2048}}}}"  # few, so that they are read at once
SHORT = ("threads=1", "measure.latency.seconds=1", "measure.latency.new_tokens=10", TEXTS)
QUICK = ["--quick", *(part for override in SHORT for part in ("--set", override))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder as a user sees it, with one finished run in it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    optkit(folder, ["run", "recipes/int8.yaml", *QUICK])
    return folder


def optkit(folder, arguments):
    command = [sys.executable, "-m", "optkit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if arguments[0] == "law":  # a law of a few tokens must not be kept for this machine
        environment["OPTKIT_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_readme_has_its_two_commands():
    assert [line for line in COMMANDS if line.startswith("pip install -e '.[test]' &&")] == [
        "pip install -e '.[test]' && python -m optkit run recipes/int8.yaml",
        "pip install -e '.[test]' && python -m pytest",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python -m optkit")])
def test_a_command_of_the_readme_runs(line, checkout):
    words = shlex.split(line)[3:]
    words = [part for word in words for part in ([str(p.relative_to(checkout)) for p in checkout.glob(word)] if "*" in word else [word])]
    short = {
        "run": QUICK,
        "train": ["--set", "model.lstm-forecaster.training.steps=5"],
        "profile": ["--rounds", "1", "--new-tokens", "4", "--set", TEXTS],
        "law": [
            "--model",
            "shape:llama-5m",
            "--passes",
            "1",
            *(part for count in ("4", "16", "64") for part in ("--prompt", count)),
            "--batch",
            "1",
            "--batch",
            "2",
        ],
    }
    assert optkit(checkout, [*words, *short.get(words[0], [])])


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.strip().splitlines()[0][:30])
def test_a_snippet_of_the_readme_runs(code, checkout):
    beside_others = code.replace("quick=True", f"quick=True, overrides={SHORT}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", beside_others]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_recipe_that_the_readme_explains_is_the_shipped_one():
    from optkit.recipe.reading import load_recipe, recipe_from_dict
    from optkit.recipe.strict_yaml import parse_recipe

    explained = recipe_from_dict(parse_recipe(re.search(r"```yaml\n(.*?)```", README, re.S)[1].encode()).data)
    shipped = load_recipe(ROOT / "recipes" / "shorter-int4.yaml")
    assert explained.transforms == shipped.transforms


def test_the_tree_of_the_readme_is_the_tree():
    named = set(re.findall(r"^      (\w+)/ ", README, re.M))
    real = {path.name for path in (ROOT / "optkit").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert named == real


def test_the_table_of_the_readme_stands_in_a_report():
    place, table = re.search(r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->", README, re.S).groups()
    assert "tpot_ms" in table
    assert any(table.strip() in path.read_text() for path in (ROOT / place).glob("*/table.md"))
