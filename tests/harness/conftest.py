"""A tiny language model with a recipe, a workload from Python, and ways to start, stop and look into whole runs."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # these tests, and the workers they start, import the workloads by name
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def signals_reach_children() -> None:
    """Undo what a shell and nohup do to commands in the background: they, and all that they start, ignore Ctrl-C and a hang-up."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def llama_folder(tiny_llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Llama and its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of some thousand words that the tokenizer knows."""
    draw = random.Random(0)
    words = ["def", "return", "if", "else", "for", "in", "class", "self", "x", "y", "z", "(", ")", ":", "=", "+", "-", "*", "/"]
    file = tmp_path_factory.mktemp("corpus") / "words.txt"
    file.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(120)))
    return file


@pytest.fixture(scope="session")
def tiny_recipe(llama_folder: Path, corpus: Path) -> Recipe:
    """Return a function that makes a recipe for the tiny Llama as plain data; keywords replace keys."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "model": str(llama_folder),
            "threads": 1,
            "task": {"language-modeling": {"corpus": {"files": [str(corpus)]}, "window": 32, "tokens": 512}},
            "transforms": ["int8"],
            "measure": {"latency": {"prompt_tokens": 8, "new_tokens": 10, "seconds": 0.5}, "memory": {}, "quality": {}},
        } | changes

    return make


@pytest.fixture(scope="session")
def finished(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a finished run of the command line, and what it printed."""
    from whole_runs import Runs, workers_of

    recipe = tiny_recipe(baseline={"dtype": "float32"}, limits={"artefact_bytes": 0.5, "perplexity": 1.5})
    runs = Runs(tmp_path_factory.mktemp("finished"), recipe)
    process = runs.start("--json")
    printed, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert workers_of(process.pid) == []
    folder = runs.folder()
    assert folder is not None
    return folder, json.loads(printed)
