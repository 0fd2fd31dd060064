"""A process that serves commands, as its parent sees it: start, send, hear, stop while others are timed, and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from optkit.core import files
from optkit.core.errors import ArmError, OptkitError, ResourceError
from optkit.harness.fork_server import fork_server
from optkit.harness.pulse import Pulse, innermost

Tell = Callable[[str], None]


class Refused(OptkitError):
    """A worker refused, with a message for the user."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Member(ABC):
    """One process that serves commands, wherever it is."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._pending = b""

    @abstractmethod
    def fileno(self) -> int:
        """Return what ``select`` waits on for an answer."""

    @abstractmethod
    def read(self) -> bytes:
        """Return what has come, or nothing where nothing will come any more."""

    @abstractmethod
    def write(self, text: bytes) -> None:
        """Send some bytes to the process.

        Raises:
            BrokenPipeError: it is not there any more.
        """

    @abstractmethod
    def is_dead(self, within_s: float = 0.0) -> bool:
        """Say whether the process has ended, or ends within this time."""

    @abstractmethod
    def exit_code(self) -> int | None:
        """Return how the process ended: negative for a signal, None where that is not known."""

    @abstractmethod
    def pulse(self) -> Pulse:
        """Return what tells whether the process still works."""

    @abstractmethod
    def whereabouts(self) -> str:
        """Return where in its code the process is, for a message."""

    @abstractmethod
    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and everything it started."""

    @abstractmethod
    def end(self) -> None:
        """End the process and everything it started."""

    def send(self, do: str, **arguments: Any) -> None:
        """Send a command; ``hear`` takes what comes back."""
        try:
            self.write((json.dumps({"do": do, "with": arguments}) + "\n").encode())
        except BrokenPipeError:
            raise self.death() from None

    def hear(self, tell: Tell | None = None) -> list[Any]:
        """Read what has come, and return the answer to the last command if it is among it: a list of one, else of none.

        Raises:
            Refused: the worker refused, with a message for the user.
            ArmError: it failed or died.
            ResourceError: it was killed, most likely for memory.
        """
        piece = self.read()
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
                raise ArmError(f"{self.name} failed: {message['failed']}; its log is {self.log}")
            else:
                answers.append(message["done"])
        return answers

    def death(self) -> OptkitError:
        """Return how the process ended, as an error."""
        self.is_dead(within_s=5)
        code = self.exit_code()
        if code == -signal.SIGKILL:
            return ResourceError(
                f"{self.name} was killed by the system, most likely because memory ran out; what is finished is kept, go on with --resume; "
                f"its log is {self.log}"
            )
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return ArmError(f"{self.name} ended {how}; its log is {self.log}")


def expect_workers() -> None:
    """Start what workers are forked from: it can import what they need while this process does something else."""
    if sys.platform == "linux":
        fork_server(_environment())


class Worker(Member):
    """A member on this host, a child of this process."""

    def __init__(self, name: str, threads: int, log: Path, rank: int = 0, ranks: int = 1, meeting: str = "", interface: str = "lo") -> None:
        super().__init__(name, log)
        self._stack = log.with_name(f".{log.stem}-{rank}.stack")
        answers, theirs = os.pipe()
        options = {"threads": threads, "rank": rank, "ranks": ranks, "meeting": meeting, "stack": str(self._stack)}
        shared = _environment()
        own = _of_rank(rank, ranks, interface) | {"OMP_NUM_THREADS": str(threads)}
        with files.refusals(log), log.open("ab") as output:
            server = fork_server(shared) if sys.platform == "linux" else None
            forked = server and server.fork(options, shared | own, theirs, output.fileno())
            if forked is None:
                output.write(b"started anew: nothing can be forked here\n")
                output.flush()
            self._process = forked or _started(options, shared | own, theirs, output)
        os.close(theirs)
        self._answers = answers

    def fileno(self) -> int:
        """Return the end of the pipe that answers come from."""
        return self._answers

    def read(self) -> bytes:
        """Return what has come."""
        return os.read(self._answers, 1 << 16)

    def write(self, text: bytes) -> None:
        """Write to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def is_dead(self, within_s: float = 0.0) -> bool:
        """Say whether the process has ended, or ends within this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=within_s)
        return self._process.returncode is not None

    def exit_code(self) -> int | None:
        """Return how it ended."""
        return self._process.returncode

    def pulse(self) -> Pulse:
        """Look at what the system counts of it."""
        return Pulse.of(self._process.pid)

    def whereabouts(self) -> str:
        """Ask it by a signal, which it answers from wherever it is."""
        if self.pulse().is_stopped:
            return "something has stopped the process"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return innermost(self._stack)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """End the process and everything it started."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._stack.unlink(missing_ok=True)


def _started(options: Mapping[str, Any], environment: Mapping[str, str], answers: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "optkit.harness.worker", "--answers", str(answers), "--parent", str(os.getpid())]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[answers],
        start_new_session=True,
        env=environment,
    )


def _of_rank(rank: int, ranks: int, interface: str) -> dict[str, str]:
    if ranks == 1:
        return {}
    group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    # accelerate wants an address even where the ranks meet at a file
    return group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": interface}


def _environment() -> dict[str, str]:
    quiet = {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    path = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)  # workers import what the parent can import, and no more
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}  # of a launcher of this process
    return {**inherited, **quiet, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
