"""Processes on other hosts, as the first rank sees them: everything goes through the agent that was started there."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from optkit.core.errors import ArmError, OptkitError, PlaceError
from optkit.harness.joining import JOIN_S, Meeting, interface_of, own_address, token
from optkit.harness.members import Member, Worker
from optkit.harness.pulse import Pulse

_ANSWER_S = 15.0


class JoinedHosts:
    """This host, and those of the ranks that have joined; the processes of an arm are spread over all of them."""

    def __init__(self, meeting: Meeting, recipe_sha256: str) -> None:
        """Wait for the agents of all ranks.

        Raises:
            OptkitError: one of them has another recipe.
            ArmError: one of them does not come.
        """
        self._address = own_address(meeting.place)
        self._interface = interface_of(self._address)
        self._token = token()
        self._listener = socket.create_server((self._address, 0), family=socket.AF_INET6 if ":" in self._address else socket.AF_INET)
        self._agents: dict[int, _Agent] = {}
        self._numbers = 0
        self._exit_code = 70
        try:
            self._meet(meeting, recipe_sha256)
        except BaseException as error:
            meeting.tell("control", {"refused": str(error)})
            meeting.linger("control")
            self.close()
            raise

    def _meet(self, meeting: Meeting, recipe_sha256: str) -> None:
        told = {rank: meeting.hear(f"rank-{rank}", f"rank {rank}") for rank in range(1, meeting.place.size)}
        others = {rank: one for rank, one in told.items() if one["recipe_sha256"] != recipe_sha256}
        if others:
            names = ", ".join(f"rank {rank} on {one['host']}" for rank, one in others.items())
            raise OptkitError(f"{names}: another recipe than that of rank 0, or other overrides; start all ranks by the same command")
        meeting.tell("control", {"address": self._address, "port": self._listener.getsockname()[1], "token": self._token})
        while len(self._agents) < len(told):
            greeting, line = self._accept("an agent")
            self._agents[greeting["rank"]] = _Agent(greeting["rank"], told[greeting["rank"]]["host"], line)

    @property
    def size(self) -> int:
        """How many commands were started together."""
        return 1 + len(self._agents)

    def start(self, name: str, threads: int, log: Path, rank: int, ranks: int, meeting: str) -> Member:
        """Start one process of an arm of so many: neighbours on one host, as far as they can be."""
        host = rank * self.size // ranks
        if host == 0:
            return Worker(name, threads, log, rank, ranks, meeting, self._interface)
        self._numbers += 1
        agent = self._agents[host]
        agent.ask(
            "start",
            number=self._numbers,
            name=name,
            threads=threads,
            rank=rank,
            ranks=ranks,
            meeting=meeting,
            log=str(log.absolute()),
        )
        greeting, line = self._accept(agent.name)
        if greeting.get("number") != self._numbers:
            raise ArmError(f"{agent.name} answers for another process than the one that was asked for")
        return RemoteMember(name, log, agent, self._numbers, line)

    def meeting(self, folder: Path, name: str) -> str:
        """Return an address of this host with a port that nobody uses."""
        with socket.create_server((self._address, 0), family=self._listener.family) as found:
            port = found.getsockname()[1]
        return f"tcp://[{self._address}]:{port}" if ":" in self._address else f"tcp://{self._address}:{port}"

    def finish(self, exit_code: int) -> None:
        """Let the agents end with this code."""
        self._exit_code = exit_code

    def close(self) -> None:
        """Let all agents end."""
        for agent in self._agents.values():
            agent.finish(self._exit_code)
        self._listener.close()

    def _accept(self, who: str) -> tuple[dict[str, Any], socket.socket]:
        """Return the next caller that knows the secret, and its greeting."""
        end = time.monotonic() + JOIN_S
        while True:
            self._listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                line, _ = self._listener.accept()
            except TimeoutError:
                raise ArmError(f"{who} did not call within {JOIN_S:g} s") from None
            greeting = _greeting(line)
            if isinstance(greeting, dict) and greeting.get("token") == self._token:
                line.settimeout(None)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return greeting, line
            line.close()

    def __enter__(self) -> JoinedHosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OptkitError):
            self._exit_code = error.exit_code
        self.close()


def _greeting(line: socket.socket) -> Any:
    """Return the first line that a caller sends, and read nothing beyond it; None where it is none of ours."""
    line.settimeout(5)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 1000:
            piece = line.recv(1)
            if not piece:
                return None
            text += piece
        return json.loads(text)
    except (OSError, ValueError):
        return None


class _Agent:
    """The line to one agent: a question, an answer."""

    def __init__(self, rank: int, host: str, line: socket.socket) -> None:
        self.name = f"rank {rank} on {host}"
        self._line = line
        self._pending = b""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return its answer.

        Raises:
            PlaceError: it refuses.
            ArmError: it is lost.
        """
        try:
            self._line.sendall((json.dumps({"do": do, "with": arguments}) + "\n").encode())
            answer = self._answer()
        except OSError as error:
            self._line.close()  # a late answer must not be taken for the next one
            raise ArmError(f"{self.name} is lost: {error}; what is finished is kept, go on with --resume") from None
        if "refused" in answer:
            raise PlaceError(f"{self.name}: {answer['refused']}")
        return answer

    def finish(self, exit_code: int) -> None:
        """Let it end."""
        with contextlib.suppress(OSError):
            self._line.sendall((json.dumps({"do": "finish", "exit_code": exit_code}) + "\n").encode())
        self._line.close()

    def _answer(self) -> dict[str, Any]:
        end = time.monotonic() + _ANSWER_S
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._line], [], [], max(0.0, end - time.monotonic()))
            piece = self._line.recv(1 << 16) if ready else b""
            if not piece:
                raise OSError("it has ended" if ready else f"no answer within {_ANSWER_S:g} s")
            self._pending += piece
        text, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(text)
        return answer


class RemoteMember(Member):
    """One process of an arm on another host."""

    def __init__(self, name: str, log: Path, agent: _Agent, number: int, line: socket.socket) -> None:
        super().__init__(f"{name} on {agent.name.rpartition(' ')[2]}", log)
        self._agent = agent
        self._number = number
        self._line = line
        self._code: int | None = None

    def fileno(self) -> int:
        """Return the connection that answers come over."""
        return self._line.fileno()

    def read(self) -> bytes:
        """Return what has come."""
        try:
            return self._line.recv(1 << 16)
        except OSError:
            return b""

    def write(self, text: bytes) -> None:
        """Send over the connection."""
        try:
            self._line.sendall(text)
        except OSError:
            raise BrokenPipeError from None

    def is_dead(self, within_s: float = 0.0) -> bool:
        """Ask the agent whether the process has ended."""
        found = self._agent.ask("ended", number=self._number, within_s=within_s)
        self._code = found["exit_code"]
        return bool(found["ended"])

    def exit_code(self) -> int | None:
        """Return how it ended, as the agent has told."""
        return self._code

    def pulse(self) -> Pulse:
        """Ask the agent to look at it."""
        return Pulse(**self._agent.ask("pulse", number=self._number))

    def whereabouts(self) -> str:
        """Ask the agent where the process is."""
        return str(self._agent.ask("whereabouts", number=self._number)["text"])

    def signal(self, number: signal.Signals) -> None:
        """Let the agent send a signal."""
        self._agent.ask("signal", number=self._number, signal_number=int(number))

    def end(self) -> None:
        """Let the agent end the process; where it is lost, so is the process."""
        with contextlib.suppress(OptkitError):
            self._agent.ask("end", number=self._number)
        self._line.close()
