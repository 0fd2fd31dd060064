"""Real worker processes that refuse, fail, die and hang: each ends with the right error and exit code, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import psutil
import pytest
from whole_runs import HERE, ROOT, classifier_recipe, workers_of

from optkit.core.errors import ArmError, OptkitError, ResourceError
from optkit.harness import processes
from optkit.harness.processes import LazyWorkers, Workers
from optkit.harness.pulse import Pulse
from optkit.recipe.reading import recipe_from_dict

RECIPE = recipe_from_dict(classifier_recipe()).to_dict()


def prepare(workers: Workers, workload: str, folder: Path, deadline_s: float = 60) -> dict:
    asked = {"recipe": RECIPE, "folder": str(folder), "dtype": None, "trust_remote_code": False, "workload": f"tiny_workloads:{workload}"}
    answer: dict = workers.ask("baseline", deadline_s, **asked)
    return answer


def mine() -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in workers_of(os.getpid())]


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    with Workers("baseline", 1, tmp_path) as started:
        yield started
    assert mine() == []


def test_a_worker_answers_refusals_and_failures_and_goes_on(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(OptkitError, match="this data cannot be used; give other data") as refused:
        prepare(workers, "refuses", tmp_path / "a")
    assert refused.value.exit_code == 2
    with pytest.raises(OptkitError, match=r"not enough memory: allocation failed") as exhausted:
        prepare(workers, "exhausts", tmp_path / "a")
    assert exhausted.value.exit_code == 4
    with pytest.raises(OptkitError, match="not enough memory: ") as too_large:
        prepare(workers, "allocates", tmp_path / "a")
    assert too_large.value.exit_code == 4
    with pytest.raises(OptkitError, match=r"must return \(nn.Module, optkit.tasks.Task\), got int"):
        prepare(workers, "returns_nonsense", tmp_path / "a")
    with pytest.raises(ArmError, match=r"baseline failed: ValueError: a mistake of ours; its log is .*baseline\.log") as failed:
        prepare(workers, "fails", tmp_path / "a")
    assert failed.value.exit_code == 70
    assert "Traceback" in (tmp_path / "baseline.log").read_text()
    assert prepare(workers, "classifier", tmp_path / "a")["kind"] == "module"


def test_a_worker_that_exits_is_named_with_its_exit_code(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(ArmError, match="baseline ended with exit code 7; its log is ") as ended:
        prepare(workers, "crashes", tmp_path / "a")
    assert ended.value.exit_code == 70


def test_a_worker_that_is_killed_most_likely_lacked_memory(workers: Workers, tmp_path: Path) -> None:
    workers.ask("memory")
    mine()[0].kill()
    with pytest.raises(ResourceError, match="baseline was killed by the system, most likely because memory ran out") as killed:
        workers.ask("memory")
    assert killed.value.exit_code == 4


def test_a_worker_that_tells_of_progress_is_waited_for_beyond_its_deadline() -> None:
    class Slow:
        """Tells something every quarter of a second and answers after a whole one."""

        name = "slow"

        def __init__(self) -> None:
            self.reads, self.writes = os.pipe()
            self.timers = [Timer(0.25 * (number + 1), os.write, (self.writes, b"." if number < 3 else b"!")) for number in range(4)]
            for timer in self.timers:
                timer.start()

        def fileno(self) -> int:
            return self.reads

        def pulse(self) -> Pulse:
            return Pulse()

        def hear(self, tell: object) -> list[str]:
            return ["done"] if os.read(self.reads, 1) == b"!" else []

    workers, slow = Workers("slow", 1, Path(), ranks=0), Slow()
    workers._members.append(slow)  # type: ignore[arg-type]
    assert workers.gather(deadline_s=0.6) == ["done"]
    for timer in slow.timers:
        timer.join()
    os.close(slow.reads)
    os.close(slow.writes)


def test_a_worker_that_hangs_meets_its_deadline(workers: Workers, tmp_path: Path) -> None:
    workers.ask("memory")
    workers.pause()
    start = time.monotonic()
    with pytest.raises(ArmError, match="no answer for 1 s: baseline hangs: something has stopped the process"):
        workers.ask("memory", 1)
    assert time.monotonic() - start < 10


def test_a_worker_stands_still_unless_it_is_awake(workers: Workers, tmp_path: Path) -> None:
    workers.ask("memory")
    (process,) = mine()
    workers.pause()
    assert _settled(process) == psutil.STATUS_STOPPED
    with workers.awake():
        assert workers.ask("memory")["peak_bytes"] > 0
        assert _settled(process) != psutil.STATUS_STOPPED
    assert _settled(process) == psutil.STATUS_STOPPED


def _settled(process: psutil.Process) -> str:
    time.sleep(0.1)
    return process.status()


def test_a_worker_starts_nothing_of_the_folder_it_is_called_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    with Workers("baseline", 1, tmp_path) as workers:
        assert workers.ask("memory")["peak_bytes"] > 0


def test_a_lazy_worker_is_never_started_when_nobody_calls(tmp_path: Path) -> None:
    with LazyWorkers(lambda: Workers("preparing", 1, tmp_path)):
        assert mine() == []
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys, time
from pathlib import Path
from optkit.harness.processes import Workers
awake, stopped = (Workers(name, 1, Path(sys.argv[1])) for name in ("awake", "stopped"))
for workers in (awake, stopped):
    try:
        workers.ask("session", recipe={}, batch_size=1)
    except Exception:
        pass
stopped.pause()
print("ready", flush=True)
time.sleep(60)
"""


def test_workers_die_with_their_parent_even_when_they_are_stopped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        assert len(workers_of(parent.pid)) == 2
        parent.kill()
        parent.wait()
        assert workers_of(parent.pid, within_s=5) == []


def test_a_lost_rank_ends_the_group_within_seconds_and_is_named(tmp_path: Path) -> None:
    with Workers("preparing", 1, tmp_path) as single:
        prepare(single, "classifier", tmp_path / "baseline")
    opened = {"recipe": RECIPE, "folder": str(tmp_path / "baseline"), "workload": "tiny_workloads:classifier"}
    with Workers("optimized", 1, tmp_path, ranks=2) as workers:
        facts = workers.ask_all("open", **opened)
        assert [fact["ranks"] for fact in facts] == [2, 2]
        second = rank(1)
        second.send_signal(signal.SIGSTOP)  # the first rank waits for it at the next meeting
        start = time.monotonic()
        timer = Timer(1.0, second.kill)
        timer.start()
        with pytest.raises(ResourceError, match="optimized rank 1 was killed by the system"):
            workers.ask("session", recipe=RECIPE, batch_size=2)
        timer.join()
        assert time.monotonic() - start < 30
    assert mine() == []


def test_ranks_meet_in_a_folder_with_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    with Workers("optimized", 1, Path("experiments"), ranks=2) as workers:
        assert len(workers.ask_all("memory", deadline_s=60)) == 2


def test_a_rank_that_hangs_is_named_when_the_deadline_is_over(tmp_path: Path) -> None:
    with Workers("optimized", 1, tmp_path, ranks=2) as workers:
        assert len(workers.ask_all("memory")) == 2
        rank(1).send_signal(signal.SIGSTOP)
        with pytest.raises(ArmError, match=r"^no answer for 1 s: optimized rank 1 hangs: something has stopped the process; what"):
            workers.ask("memory", 1)
    assert mine() == []


def test_ranks_that_do_nothing_are_given_up_long_before_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HANG_S", 3.0)
    with Workers("optimized", 1, tmp_path, ranks=2) as workers:
        assert len(workers.ask_all("memory")) == 2
        rank(1).send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ArmError, match=r"^no answer for [3-6] s: optimized rank 1 hangs: something has stopped the process"):
            workers.ask("memory")
        assert time.monotonic() - start < 10
    assert mine() == []


def test_where_a_worker_sleeps_is_told_by_line(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HANG_S", 3.0)
    with pytest.raises(ArmError, match=r"baseline hangs: in sleeps \(tiny_workloads\.py, line \d+\)"):
        prepare(workers, "sleeps", tmp_path / "a")


def rank(number: int) -> psutil.Process:
    (found,) = (process for process in mine() if process.name() == f"worker rank {number}")
    return found
