"""The parent's side of a worker: start, ask with a deadline, stop while others are timed, and end. No worker outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from optkit.core import files
from optkit.core.errors import ArmError, OptkitError, ResourceError

DEADLINE_S = 1800.0
STARTUP_S = 120.0
Tell = Callable[[str], None]


class Refused(OptkitError):
    """A worker refused, with a message for the user."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Worker:
    """One process that serves commands."""

    def __init__(self, name: str, threads: int, log: Path, rank: int = 0, ranks: int = 1, meeting: Path | None = None) -> None:
        self.name = name
        self._log = log
        self._pending = b""
        answers, theirs = os.pipe()
        command = [sys.executable, "-P", "-m", "optkit.harness.worker", "--answers", str(theirs), "--parent", str(os.getpid())]
        command += ["--threads", str(threads), "--rank", str(rank), "--ranks", str(ranks), "--meeting", str(meeting or "")]
        with files.refusals(log), log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs],
                start_new_session=True,
                env=_environment(threads, rank, ranks),
            )
        os.close(theirs)
        self._answers = answers

    def fileno(self) -> int:
        """Return what ``select`` waits on for an answer."""
        return self._answers

    def send(self, do: str, **arguments: Any) -> None:
        """Send a command; ``hear`` takes what comes back."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"do": do, "with": arguments}) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.death() from None

    def hear(self, tell: Tell | None = None) -> list[Any]:
        """Read what has come, and return the answer to the last command if it is among it: a list of one, else of none.

        Raises:
            Refused: the worker refused, with a message for the user.
            ArmError: it failed or died.
            ResourceError: it was killed, most likely for memory.
        """
        piece = os.read(self._answers, 1 << 16)
        if not piece:
            raise self.death()
        *lines, self._pending = (self._pending + piece).split(b"\n")
        answers = []
        for message in map(json.loads, lines):
            if "progress" in message:
                if tell is not None:
                    tell(message["progress"])
            elif "refused" in message:
                raise Refused(message["refused"], message["exit_code"])
            elif "failed" in message:
                raise ArmError(f"{self.name} failed: {message['failed']}; its log is {self._log}")
            else:
                answers.append(message["done"])
        return answers

    def is_dead(self, within_s: float = 0.0) -> bool:
        """Say whether the process has ended, or ends within this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=within_s)
        return self._process.returncode is not None

    def death(self) -> OptkitError:
        """Return how the process ended, as an error."""
        self.is_dead(within_s=5)
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return ResourceError(
                f"{self.name} was killed by the system, most likely because memory ran out; what is finished is kept, go on with --resume; "
                f"its log is {self._log}"
            )
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return ArmError(f"{self.name} ended {how}; its log is {self._log}")

    def pause(self) -> None:
        """Stop the process, threads and all, so that it takes nothing from the one that is timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the process go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End the process and everything it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class Workers:
    """The ranks of one arm, asked as one. A group of one is the usual case."""

    def __init__(self, name: str, threads: int, folder: Path, ranks: int = 1) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._started = False
        self._log = folder / f"{name}.log"
        meeting = folder.absolute() / f".{name}-{time.monotonic_ns()}.meeting"  # a file:// address has no relative form
        self._members: list[Worker] = []
        try:
            for rank in range(ranks):
                label = name if ranks == 1 else f"{name} rank {rank}"
                self._members.append(Worker(label, threads, self._log, rank, ranks, meeting))
        except BaseException:
            self.end()
            raise

    def ask(self, do: str, deadline_s: float = DEADLINE_S, tell: Tell | None = None, **arguments: Any) -> Any:
        """Give all ranks one command and return the first rank's answer."""
        return self.ask_all(do, deadline_s, tell, **arguments)[0]

    def ask_all(self, do: str, deadline_s: float = DEADLINE_S, tell: Tell | None = None, **arguments: Any) -> list[Any]:
        """Give all ranks one command and return all answers."""
        self.send(do, **arguments)
        return self.gather(deadline_s, tell)

    def send(self, do: str, **arguments: Any) -> None:
        """Give all ranks one command; ``gather`` takes the answers."""
        if not self._started:
            self.gather(STARTUP_S, None)
            self._started = True
        for member in self._members:
            member.send(do, **arguments)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Run while the block lasts, and stand still afterwards."""
        for member in self._members:
            member.resume()
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Stand still, all ranks."""
        for member in self._members:
            member.pause()

    def end(self) -> None:
        """End all ranks."""
        for member in self._members:
            member.end()
        self._members.clear()

    def gather(self, deadline_s: float = DEADLINE_S, tell: Tell | None = None) -> list[Any]:
        """Take the answers of all ranks as they come: whoever fails first is named, while the others still wait for it."""
        end = time.monotonic() + deadline_s
        found: dict[Worker, Any] = {}
        while len(found) < len(self._members):
            waiting = [member for member in self._members if member not in found]
            ready, _, _ = select.select(waiting, [], [], max(0.0, end - time.monotonic()))
            if not ready:
                names = ", ".join(member.name for member in waiting)
                raise ArmError(f"{names} did not answer within {deadline_s:.0f} s; the log is {self._log}")
            for member in ready:
                try:
                    answers = member.hear(tell)
                except ArmError:
                    self._blame_the_dead(member)
                    raise
                if answers:
                    found[member] = answers[0]
                else:
                    end = time.monotonic() + deadline_s  # it tells of progress, so it does not hang
        return [found[member] for member in self._members]

    def _blame_the_dead(self, failed: Worker) -> None:
        """Raise for a rank that has died, if there is one: that another one failed for want of it is no news."""
        for member in self._members:
            if member is not failed and member.is_dead(within_s=0.2):
                raise member.death() from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()


class LazyWorkers:
    """Workers that are started by the first one who calls for them, and ended with the block."""

    def __init__(self, start: Callable[[], Workers]) -> None:
        self._start = start
        self._workers: Workers | None = None

    def __call__(self) -> Workers:
        """Return the workers, started now if they were not."""
        if self._workers is None:
            self._workers = self._start()
        return self._workers

    def __enter__(self) -> LazyWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._workers is not None:
            self._workers.end()


def _environment(threads: int, rank: int, ranks: int) -> dict[str, str]:
    group = {}
    if ranks > 1:  # accelerate wants an address even where the ranks meet at a file
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}
    quiet = {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    path = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)  # workers import what the parent can import, and no more
    return {**os.environ, **group, **quiet, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
