"""The command line called in this process, and a recipe for a tiny model on disk."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optkit.cli import main
from optkit.recipe.yaml_writing import to_yaml


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def optkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """Return a function that calls the command line in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["optkit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, printed.out, printed.err)

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of the user, which is empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def recipe(home: Path, model_folder: Path) -> Callable[..., Path]:
    """Return a function that writes the recipe of a tiny model; keywords replace keys."""
    corpus = model_folder.parent / "words.txt"
    corpus.write_text("def x ( y ) : return x + y " * 200)

    def write(**changes: Any) -> Path:
        data = {
            "name": "tiny",
            "model": str(model_folder),
            "threads": 1,
            "task": {"language-modeling": {"corpus": {"files": [str(corpus)]}, "window": 32, "tokens": 512}},
            "transforms": ["int8"],
            "measure": {"latency": {"prompt_tokens": 8, "new_tokens": 4, "seconds": 0.3}, "memory": {}, "quality": {}},
        }
        file = home / "tiny.yaml"
        file.write_text(to_yaml({key: value for key, value in (data | changes).items() if value is not None}))
        return file

    return write
