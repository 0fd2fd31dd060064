"""Workers are forked from a process that has imported what they need, and are as separate as those that are started anew."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from optkit.core.errors import ArmError, ResourceError
from optkit.harness import fork_server as home
from optkit.harness.processes import Workers


@pytest.fixture(autouse=True)
def no_server_stays() -> Iterator[None]:
    """End what a test has started."""
    yield
    for server in home._started:
        server.end()
    home._started.clear()


def pid(workers: Workers) -> int:
    workers.ask("memory")
    return int(workers._members[0]._process.pid)  # type: ignore[attr-defined]


def parent_of(workers: Workers) -> psutil.Process:
    found = psutil.Process(pid(workers)).parent()
    assert found is not None
    return found


def test_workers_are_processes_of_their_own_with_one_parent_that_is_a_child_of_this_one(tmp_path: Path) -> None:
    with Workers("one", 1, tmp_path) as one, Workers("two", 1, tmp_path) as two:
        assert len({pid(one), pid(two), os.getpid()}) == 3
        assert parent_of(one) == parent_of(two)
        assert parent_of(one).ppid() == os.getpid()


def test_a_worker_has_the_folder_and_the_log_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers("warm", 1, tmp_path) as warm:
        pid(warm)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Workers("one", 2, tmp_path) as one:
        process = psutil.Process(pid(one))
        assert Path(process.cwd()) == tmp_path / "here"
        logs = {file.path for file in process.open_files()}
        assert str(tmp_path / "one.log") in logs
        assert str(tmp_path / "warm.log") not in logs


def test_another_environment_has_another_server_and_the_last_one_ends_when_it_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Workers("one", 1, tmp_path) as one:
        before = parent_of(one)
        monkeypatch.setenv("OPTKIT_KERNELS", "torch")
        with Workers("two", 1, tmp_path) as two:
            assert parent_of(two) != before
            assert before.is_running()
    with Workers("three", 1, tmp_path) as three:
        pid(three)
    assert not before.is_running()


def test_a_worker_has_the_limits_that_this_process_has_now(tmp_path: Path) -> None:
    with Workers("before", 1, tmp_path) as before:
        pid(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, limits[1]))
    try:
        with Workers("one", 1, tmp_path) as one:
            assert psutil.Process(pid(one)).rlimit(psutil.RLIMIT_FSIZE)[0] == 2**30
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_where_nothing_can_be_forked_workers_are_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def declined(*arguments: object) -> int:
        raise OSError("the other end has gone")

    monkeypatch.setattr(home.ForkServer, "_asked", declined)
    with Workers("one", 1, tmp_path) as one:
        assert parent_of(one).pid == os.getpid()
    assert (tmp_path / "one.log").read_text().startswith("started anew")


def test_a_server_that_does_not_answer_ends_before_a_worker_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_STARTUP_S", 0.01)
    with Workers("one", 1, tmp_path) as one:
        assert parent_of(one).pid == os.getpid()
        (server,) = home._started
        assert server._process.wait(5) == -signal.SIGKILL


def test_a_worker_ends_with_its_input(tmp_path: Path) -> None:
    with Workers("one", 1, tmp_path) as one, Workers("two", 1, tmp_path) as two:
        pid(two)
        process = psutil.Process(pid(one))
        one._members[0]._process.stdin.close()  # type: ignore[attr-defined]
        assert process.wait(10) is None
        pid(two)


def test_a_server_that_was_killed_takes_its_workers_along_and_the_next_ones_have_another(tmp_path: Path) -> None:
    with Workers("one", 1, tmp_path) as one:
        server = parent_of(one)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="one was killed by the system"):
            for _ in range(50):
                one.ask("memory")
                time.sleep(0.1)
    with Workers("two", 1, tmp_path) as two:
        assert parent_of(two) != server


def test_after_a_question_that_was_interrupted_there_is_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(line: object, count: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home, "_exactly", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Workers("one", 1, tmp_path)
    (lost,) = home._started
    with Workers("two", 1, tmp_path) as two:
        pid(two)
    assert lost not in home._started
    assert lost._process.poll() is not None


def test_how_a_worker_ended_is_told_by_the_server(tmp_path: Path) -> None:
    with Workers("one", 1, tmp_path) as one:
        os.kill(pid(one), signal.SIGTERM)
        with pytest.raises(ArmError, match="one ended by signal SIGTERM"):
            one.ask("memory")
