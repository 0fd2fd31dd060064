"""A process that has imported what workers need, and forks each of them: one waits for the imports once, and not for every worker.

It forks only while it has no threads but such as expect it, and no driver of a GPU, which outlives no fork; else workers are started anew.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from optkit.harness import worker

_IMPORTED = ("optkit.harness.arm", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "accelerate")
_STARTUP_S = 120.0
_INHERITED = ("Umask", "Uid", "Gid", "Cpus_allowed_list")
_PASSING = {"PYTEST_CURRENT_TEST"}  # changes while a process runs, and no library reads it


class Forked:
    """A worker that was forked for this process: what is needed here of ``subprocess.Popen``, under the same names."""

    def __init__(self, pid: int, stdin: int, status: int) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
            told = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(told) if told else -signal.SIGKILL  # with the server, which nobody but the system ends
        return self.returncode


class ForkServer:
    """The server, as the process that started it sees it. It ends with that process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.begun_with = _begun_with(environment)
        self.owner = os.getpid()
        self._forked: list[Forked] = []
        self._interrupted = False
        self._turn = threading.Lock()
        self._line, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "optkit.harness.fork_server", "--line", str(theirs.fileno()), "--parent", str(self.owner)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=dict(environment),
            )
        self._line.settimeout(_STARTUP_S)

    def is_lost(self) -> bool:
        """Say whether it could fork workers, and cannot any more."""
        return self._interrupted or (bool(self._forked) and self._process.poll() is not None)

    def is_idle(self) -> bool:
        """Say whether no worker that it has forked is in use."""
        return all(each.returncode is not None for each in self._forked)

    def fork(self, options: Mapping[str, Any], environment: Mapping[str, str], answers: int, output: int) -> Forked | None:
        """Start a worker; None where the server cannot fork.

        Args:
            options: those of ``worker.run``, but for ``answers`` and ``parent``.
            environment: its whole environment.
            answers: the end of a pipe that it writes to.
            output: a file that it prints to.
        """
        request = json.dumps({"options": dict(options), "environment": dict(environment)}).encode()
        theirs, stdin = os.pipe()
        status, told = os.pipe()
        forked = None
        try:
            with self._turn, _opened(".") as folder:
                pid = self._asked(request, [theirs, output, answers, folder, told])
                if pid:
                    forked = Forked(pid, stdin, status)
                    self._forked = [*(each for each in self._forked if each.returncode is None), forked]
        except OSError:
            self._process.kill()  # what it forks late must not answer beside another worker
        except BaseException:
            self._interrupted = True  # a late answer would be taken for that to the next question
            raise
        finally:
            for ours in (theirs, told) if forked else (theirs, told, stdin, status):
                os.close(ours)
        return forked

    def end(self) -> None:
        """End it and the workers that it has forked."""
        self._line.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def _asked(self, request: bytes, passed: Sequence[int]) -> int:
        """Return the number of the new process, or 0 where there is none."""
        socket.send_fds(self._line, [len(request).to_bytes(8, "big")], passed)
        self._line.sendall(request)
        return int.from_bytes(_exactly(self._line, 8), "big")


_started: list[ForkServer] = []
_turn = threading.Lock()


def fork_server(environment: Mapping[str, str]) -> ForkServer:
    """Return this process's server for an environment, started where there is none; one for another ends when its workers have."""
    wanted = _begun_with(environment)
    with _turn:
        for server in [each for each in _started if each.is_lost() or (each.begun_with != wanted and each.is_idle())]:
            _started.remove(server)
            server.end()
        found = [each for each in _started if each.owner == os.getpid() and each.begun_with == wanted]
        if not found:
            found = [ForkServer(environment)]
            _started.extend(found)
        return found[0]


def _begun_with(environment: Mapping[str, str]) -> Any:
    """Return what a process that this one starts would have from it: a server that began with something else is of no use."""
    own = Path("/proc/self")
    status = [line for line in (own / "status").read_text().splitlines() if line.startswith(_INHERITED)]
    lasting = {name: value for name, value in environment.items() if name not in _PASSING}
    return lasting, (own / "limits").read_text(), status, os.getpriority(os.PRIO_PROCESS, 0)


@atexit.register
def _end_all() -> None:
    for server in _started:
        server.end()


def main() -> None:
    """Fork workers until the line ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--line", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="whose server this is; it ends with the line to it")
    options = parser.parse_args()
    for name in _IMPORTED:
        importlib.import_module(name)
    try:
        if _can_fork():
            gc.freeze()  # a collection would write to what all workers share
            _serve(socket.socket(fileno=options.line))
    finally:
        os._exit(0)  # at once, as its workers end with it


def _can_fork() -> bool:
    own = Path("/proc/self")
    if "libcuda.so" in (own / "maps").read_text():
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(list((own / "task").iterdir())) == 1  # pools of threads that are made for a fork have ended theirs before it


def _serve(line: socket.socket) -> None:
    server = os.getpid()
    running: dict[int, tuple[int, int]] = {}  # by the descriptor that tells of a worker's end: its number, and whom to tell
    with selectors.DefaultSelector() as events:
        events.register(line, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fd != line.fileno():
                    events.unregister(key.fd)
                    _tell_end(key.fd, *running.pop(key.fd))
                    continue
                head, passed, _, _ = socket.recv_fds(line, 8, 5)
                if not head:
                    return
                request = json.loads(_exactly(line, int.from_bytes(head, "big")))
                try:
                    pid = os.fork()
                except OSError:  # no more processes, or no memory
                    for descriptor in passed:
                        os.close(descriptor)
                    line.sendall(bytes(8))
                    continue
                if not pid:
                    for own in (events, line):
                        own.close()
                    for descriptor in (*running, *(status for _, status in running.values()), passed[-1]):
                        os.close(descriptor)
                    _become_worker(request, passed[:-1], server)
                with contextlib.suppress(OSError):  # the worker may have done so itself
                    os.setpgid(pid, pid)
                for descriptor in passed[:-1]:
                    os.close(descriptor)
                ended = os.pidfd_open(pid)
                running[ended] = pid, passed[-1]
                events.register(ended, selectors.EVENT_READ)
                line.sendall(pid.to_bytes(8, "big"))


def _tell_end(ended: int, pid: int, status: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody may listen any more
        os.write(status, str(code).encode())
    os.close(status)
    os.close(ended)


def _become_worker(request: Mapping[str, Any], passed: Sequence[int], server: int) -> NoReturn:
    stdin, output, answers, folder = passed
    os.setpgid(0, 0)
    os.dup2(stdin, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(stdin)
    os.close(output)
    code = 1
    try:
        os.fchdir(folder)
        os.close(folder)
        os.environ.clear()
        os.environ.update(request["environment"])
        worker.run(argparse.Namespace(**request["options"], answers=answers, parent=server))
        code = 0
    except BaseException:  # nothing may go on from here as the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    """Give a descriptor of a folder, which may be gone but for those who are there."""
    found = os.open(folder, os.O_PATH)
    try:
        yield found
    finally:
        os.close(found)


def _exactly(line: socket.socket, count: int) -> bytes:
    """Return so many bytes.

    Raises:
        OSError: the line ends before.
    """
    found = b""
    while len(found) < count:
        piece = line.recv(count - len(found))
        if not piece:
            raise OSError("the other end has gone")
        found += piece
    return found


if __name__ == "__main__":
    main()
