"""One command started several times, as launchers do: the first runs the recipe, the others lend it their places, and all end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from whole_runs import workers_of

from optkit.core.errors import MissingError, OptkitError
from optkit.harness.joining import World, interface_of, own_address, world

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path, port: int, tiny_recipe: Any) -> Iterator[Start]:
    """Start the command of one rank; whatever still runs at the end is ended, and that nothing does is part of every test."""
    started: list[subprocess.Popen[str]] = []

    def go(
        rank: int, *options: str, size: int = 2, steps: Any = ({"tensor_parallel": {"size": 2}},), **changes: Any
    ) -> subprocess.Popen[str]:
        latency = {"prompt_tokens": 8, "new_tokens": 10, "seconds": 0.5, "batch_sizes": [2]}
        recipe = tiny_recipe(transforms=[{"tensor_parallel": {"size": 2}}], measure={"latency": latency, "quality": {}}, **changes)
        file = tmp_path / f"joined-{rank}.yaml"
        file.write_text(yaml.safe_dump({**recipe, "name": "joined"}))
        launcher = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "optkit", "run", str(file), "--out", str(tmp_path / "out"), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **launcher, "HF_HUB_OFFLINE": "1"},
            )
        )
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=within_s)
    return process.returncode, output, errors


@pytest.mark.slow
def test_ranks_with_different_recipes_are_refused_by_name(start: Start) -> None:
    first, second = start(0), start(1, seed=7)
    code, _, errors = ended(first, 60)
    assert code == 2
    assert "rank 1 on" in errors and "another recipe than that of rank 0" in errors and "Traceback" not in errors
    code, _, errors = ended(second, 30)
    assert code == 70
    assert "rank 0 has ended" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_with_the_remedy(start: Start, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        code, _, errors = ended(start(0), 60)
    assert code == 2
    assert f"port {port} of 127.0.0.1 is taken; choose another one by MASTER_PORT" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_two_commands_serve_one_model_and_where_one_is_killed_both_end_and_go_on(start: Start, tmp_path: Path) -> None:
    first, second = start(0), start(1)
    deadline = time.monotonic() + 120
    while not workers_of(second.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second.kill()
    code, _, errors = ended(first, 60)
    assert code == 70
    assert "rank 1 on" in errors and "lost" in errors and "Traceback" not in errors
    time.sleep(1)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert left == []
    assert workers_of(first.pid) == workers_of(second.pid) == []
    again = [start(0, "--resume"), start(1, "--resume")]
    code, output, errors = ended(again[0], 180)
    assert code == 0, errors
    optimized = json.loads(output)["arms"]["optimized"]
    assert optimized["ranks"] == 2
    assert optimized["metrics"]["greedy_match"]["value"] == 1
    assert ended(again[1], 20)[0] == 0
    assert [folder.name for folder in (tmp_path / "out" / "joined").iterdir()] == ["0001"]


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({**LAUNCHED, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (LAUNCHED, World(1, 4, "10.0.0.1", 29500)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, World(2, 3, "a", 7)),
    ],
)
def test_what_a_launcher_says_is_read(environment: dict[str, str], expected: World | None) -> None:
    assert world(environment) == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "x"}, "expected to hold whole numbers"),
        ({"RANK": "4"}, "RANK=4 is none of the 4 ranks"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 4, and MASTER_ADDR is not set"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, str], told: str) -> None:
    with pytest.raises(OptkitError, match=told):
        world({**LAUNCHED, **change})


def test_the_way_to_the_first_rank_names_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address(World(1, 2, "127.0.0.1", 29500)) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(MissingError, match=r"no network interface has the address 203\.0\.113\.9"):
        interface_of("203.0.113.9")
