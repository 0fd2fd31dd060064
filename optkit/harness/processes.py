"""The processes of one arm, asked as one, with deadlines. Whoever fails or hangs is named, and no process outlives its parent."""

from __future__ import annotations

import contextlib
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from optkit.core.errors import ArmError
from optkit.harness.hosts import HERE, Hosts
from optkit.harness.members import Member, Refused, Tell
from optkit.harness.pulse import WAITS, Watch

__all__ = ["LazyWorkers", "Refused", "Tell", "Workers"]

DEADLINE_S = 1800.0
STARTUP_S = 120.0
HANG_S = 15.0  # without any work of any of those that are waited for
_LOOK_EVERY_S = 1.0


class Workers:
    """The ranks of one arm, asked as one. A group of one is the usual case."""

    def __init__(self, name: str, threads: int, folder: Path, ranks: int = 1, hosts: Hosts = HERE) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._started = False
        self._log = folder / f"{name}.log"
        self._members: list[Member] = []
        try:
            meeting = hosts.meeting(folder, name) if ranks > 1 else ""
            for rank in range(ranks):
                label = name if ranks == 1 else f"{name} rank {rank}"
                self._members.append(hosts.start(label, threads, self._log, rank, ranks, meeting))
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
            member.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Stand still, all ranks."""
        for member in self._members:
            member.signal(signal.SIGSTOP)

    def end(self) -> None:
        """End all ranks."""
        for member in self._members:
            member.end()
        self._members.clear()

    def gather(self, deadline_s: float = DEADLINE_S, tell: Tell | None = None) -> list[Any]:
        """Take the answers of all ranks as they come: whoever fails first is named, while the others still wait for it."""
        end = time.monotonic() + deadline_s
        found: dict[Member, Any] = {}
        watch = Watch()
        while len(found) < len(self._members):
            waiting = [member for member in self._members if member not in found]
            ready, _, _ = select.select(waiting, [], [], max(0.0, min(_LOOK_EVERY_S, end - time.monotonic())))
            if not ready:
                still = watch.still_s([member.pulse() for member in waiting])
                if time.monotonic() >= end or still >= HANG_S:
                    raise self._hanging(waiting, deadline_s if time.monotonic() >= end else still)
                continue
            for member in ready:
                try:
                    answers = member.hear(tell)
                except (ArmError, Refused) as error:
                    if error.exit_code == ArmError.exit_code:  # it may have failed for want of another one
                        self._blame_the_dead(member)
                    raise
                if answers:
                    found[member] = answers[0]
                else:
                    end = time.monotonic() + deadline_s  # it tells of progress, so it does not hang
        return [found[member] for member in self._members]

    def _hanging(self, waiting: list[Member], seconds: float) -> ArmError:
        """Return the error that names those who hang, and not those who only wait for them."""
        places = {member.name: member.whereabouts() for member in waiting}
        guilty = {name: place for name, place in places.items() if not place.startswith(WAITS)} or places
        told = "; ".join(f"{name} hangs: {place}" for name, place in guilty.items())
        return ArmError(f"no answer for {seconds:.0f} s: {told}; what is finished is kept, go on with --resume; the log is {self._log}")

    def _blame_the_dead(self, failed: Member) -> None:
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
