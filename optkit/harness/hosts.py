"""Where the processes of an arm are started: on this host, or also on others that have joined it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from optkit.harness.members import Member, Worker


class Hosts(Protocol):
    """Places for processes."""

    def start(self, name: str, threads: int, log: Path, rank: int, ranks: int, meeting: str) -> Member:
        """Start one process of an arm of so many."""

    def meeting(self, folder: Path, name: str) -> str:
        """Return an address where the processes of an arm can meet."""

    def finish(self, exit_code: int) -> None:
        """Let those that have joined end with this code."""


class ThisHost:
    """All processes on this host, which meet at a file."""

    def start(self, name: str, threads: int, log: Path, rank: int, ranks: int, meeting: str) -> Member:
        """Start one process of an arm of so many."""
        return Worker(name, threads, log, rank, ranks, meeting)

    def meeting(self, folder: Path, name: str) -> str:
        """Return the address of a file that is not there yet."""
        return f"file://{folder.absolute()}/.{name}-{time.monotonic_ns()}.meeting"  # such an address has no relative form

    def finish(self, exit_code: int) -> None:
        """Do nothing: nobody has joined."""


HERE = ThisHost()
