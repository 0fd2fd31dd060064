"""What a rank other than the first does: it starts processes here for the first one, and passes on what they say. It ends with it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from optkit.core.errors import ArmError, OptkitError
from optkit.harness.joining import Meeting, interface_of, own_address
from optkit.harness.members import Worker


def serve(meeting: Meeting, recipe_sha256: str) -> int:
    """Serve the first rank until it is done, and return its exit code.

    Raises:
        ArmError: the first rank is lost, or does not come.
    """
    place = meeting.place
    address = own_address(place)
    meeting.tell(f"rank-{place.rank}", {"recipe_sha256": recipe_sha256, "host": socket.gethostname()})
    where = meeting.hear("control", "rank 0")
    if where.get("refused"):
        raise ArmError(f"rank 0 has ended: {where['refused']}")
    try:
        with _Agent(place.rank, where, interface_of(address)) as agent:
            return agent.serve()
    except OSError:
        raise ArmError("rank 0 is lost; what it had finished is kept by it") from None


class _Agent:
    """The processes that this rank has started, by number."""

    def __init__(self, rank: int, where: dict[str, Any], interface: str) -> None:
        self._where = where
        self._interface = interface
        self._workers: dict[int, Worker] = {}
        self._readers: dict[int, threading.Thread] = {}
        self._control = self._call({"rank": rank})

    def serve(self) -> int:
        """Do what is asked until the first rank says that it is done."""
        with self._control.makefile("r", encoding="utf-8") as requests:
            for line in requests:
                request = json.loads(line)
                if request["do"] == "finish":
                    return int(request["exit_code"])
                try:
                    answer = getattr(self, f"do_{request['do']}")(**request["with"])
                except (OSError, OptkitError) as error:
                    answer = {"refused": str(error)}
                self._control.sendall((json.dumps(answer) + "\n").encode())
        raise ArmError("rank 0 is lost; what it had finished is kept by it")

    def do_start(self, number: int, name: str, threads: int, rank: int, ranks: int, meeting: str, log: str) -> dict[str, Any]:
        """Start a process, and connect it with the first rank."""
        if not Path(log).parent.is_dir():
            return {"refused": f"{Path(log).parent} is not here; put --out on a file system that all hosts share"}
        worker = Worker(name, threads, Path(log), rank, ranks, meeting, self._interface)
        self._workers[number] = worker
        line = self._call({"number": number})
        self._readers[number] = threading.Thread(target=_pass_on, args=(worker, line), daemon=True)
        self._readers[number].start()
        threading.Thread(target=_pass_back, args=(worker, line), daemon=True).start()
        return {}

    def do_signal(self, number: int, signal_number: int) -> dict[str, Any]:
        """Send a signal to a process."""
        self._workers[number].signal(signal.Signals(signal_number))
        return {}

    def do_pulse(self, number: int) -> dict[str, Any]:
        """Look at a process."""
        pulse = self._workers[number].pulse()
        return {"state": pulse.state, "ticks": pulse.ticks, "moved": pulse.moved}

    def do_whereabouts(self, number: int) -> dict[str, Any]:
        """Ask a process where it is."""
        return {"text": self._workers[number].whereabouts()}

    def do_ended(self, number: int, within_s: float) -> dict[str, Any]:
        """Say whether a process has ended, and how."""
        worker = self._workers[number]
        return {"ended": worker.is_dead(within_s), "exit_code": worker.exit_code()}

    def do_end(self, number: int) -> dict[str, Any]:
        """End a process."""
        worker = self._workers.pop(number, None)
        if worker is not None:
            worker.signal(signal.SIGKILL)
            self._readers.pop(number).join(5)  # it must not read from a number that stands for another pipe by then
            worker.end()
        return {}

    def _call(self, greeting: dict[str, Any]) -> socket.socket:
        line = socket.create_connection((self._where["address"], self._where["port"]), timeout=20)
        line.settimeout(None)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        line.sendall((json.dumps({"token": self._where["token"], **greeting}) + "\n").encode())
        return line

    def __enter__(self) -> _Agent:
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._workers):
            self.do_end(number)
        self._control.close()


def _pass_on(worker: Worker, line: socket.socket) -> None:
    """Send what a process answers to the first rank."""
    with contextlib.suppress(OSError):
        while piece := worker.read():
            line.sendall(piece)
        line.shutdown(socket.SHUT_WR)


def _pass_back(worker: Worker, line: socket.socket) -> None:
    """Give a process what the first rank sends."""
    with contextlib.suppress(OSError, ValueError):
        while piece := line.recv(1 << 16):
            worker.write(piece)
