"""Starts, stops and looks into whole runs, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from optkit.core import files
from optkit.models.artefact import MANIFEST
from optkit.recipe.yaml_writing import to_yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DRIVER = """
import functools, sys
import optkit.harness.run as home
home.run = functools.partial(home.run, workload={workload!r})
from optkit.cli import main
main()
"""


def classifier_recipe(**changes: Any) -> dict[str, Any]:
    """Return a recipe for the workload, as plain data."""
    measure = {"latency": {"seconds": 0.3, "precision": 0.5}, "memory": {}, "quality": {}}
    return {"name": "tiny", "threads": 1, "transforms": ["int8"], "measure": measure} | changes


class Runs:
    """Starts runs of one recipe in one folder, by the command line, and looks at what they leave."""

    def __init__(self, folder: Path, recipe: dict[str, Any], workload: str | None = None) -> None:
        self.out = folder / "experiments"
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(to_yaml(recipe))
        self._name = recipe["name"]
        self._call = ["-c", DRIVER.format(workload=workload)] if workload else ["-m", "optkit"]

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start a run and return its process."""
        command = [sys.executable, *self._call, "run", str(self._recipe), "--out", str(self.out), *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def folder(self) -> Path | None:
        """Return the latest run's folder."""
        return max((self.out / self._name).glob("[0-9]*"), default=None)

    def reached(self, stage: str, process: subprocess.Popen[str], seconds: float = 300) -> bool:
        """Wait until a process works on a run in which a stage is finished, by it or before it; False where the process ended before."""
        end = time.monotonic() + seconds
        while process.poll() is None:
            folder = self.folder()
            if folder is not None and (folder / "work" / f"{stage}.json").exists() and _has_open(process.pid, folder / "work" / "lock"):
                return True
            assert time.monotonic() < end, f"{stage} was not reached within {seconds} s"
            time.sleep(0.01)
        return False

    def stop(self, process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
        """Send a signal, and check that nothing of the run lives on after five seconds and that what is there is whole."""
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert workers_of(process.pid, within_s=5) == [], said
        for run in (self.out / self._name).glob("[0-9]*"):
            assert_whole(run)
        return process.returncode, said

    def finish(self, *options: str) -> Path:
        """Run to the end and return the sealed folder."""
        process = self.start(*options)
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
        folder = self.folder()
        assert folder is not None
        files.verify(folder)
        return folder


def _has_open(process: int, path: Path) -> bool:
    try:
        return any(each.path == str(path) for each in psutil.Process(process).open_files())
    except (psutil.Error, ProcessLookupError):
        return False


def workers_of(parent: int, within_s: float = 0.0) -> list[int]:
    """Return the worker processes that a parent has started and that still live, after at most this time."""
    end = time.monotonic() + within_s
    while True:
        alive = [process.pid for process in psutil.process_iter() if _is_worker_of(process, parent)]
        if not alive or time.monotonic() >= end:
            return alive
        time.sleep(0.05)


def _is_worker_of(process: psutil.Process, parent: int) -> bool:
    try:
        words = process.cmdline()
        started = "optkit.harness.worker" in words or ("optkit.harness.fork_server" in words and os.getsid(process.pid) != process.pid)
        return started and words[words.index("--parent") + 1] == str(parent)
    except (psutil.Error, ProcessLookupError):
        return False


def assert_whole(run: Path) -> None:
    """Check that every file under a final name is complete, whatever happened to the process that wrote it."""
    visible = [path for path in run.rglob("*") if not any(part.startswith(".") for part in path.relative_to(run).parts)]
    for path in visible:
        if path.suffix == ".json":
            files.read_json(path)
        if path.is_dir() and path.name in ("baseline", "optimized", "bfloat16", "artefact"):
            files.verify(path, MANIFEST)
        if path.is_dir() and path.name == "answers":
            files.verify(path)
    if files.is_sealed(run):
        files.verify(run)
