"""One command started on several hosts: by ``torchrun``, ``accelerate launch``, Slurm, or by hand with RANK, WORLD_SIZE and MASTER_ADDR.

The first rank runs the recipe; the others lend it their places, and end when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from optkit.core.errors import ArmError, MissingError, OptkitError

JOIN_S = 25.0
_PORT = 29500
_LINGER_S = 3.0


@dataclass(frozen=True)
class World:
    """Which of how many commands this is, and where the first one is."""

    rank: int
    size: int
    address: str
    port: int


def world(environment: Mapping[str, str] = os.environ) -> World | None:
    """Return what a launcher says of this command; None where it was started alone.

    Raises:
        OptkitError: what it says makes no sense.
    """
    rank, size = (
        ("RANK", "WORLD_SIZE") if "RANK" in environment else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    )  # a batch script itself is no task of srun
    if rank not in environment or size not in environment:
        return None
    try:
        found = World(
            int(environment[rank]), int(environment[size]), environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT", _PORT))
        )
    except ValueError:
        told = ", ".join(f"{name}={environment.get(name)!r}" for name in (rank, size, "MASTER_PORT"))
        raise OptkitError(f"the environment of a launcher is expected to hold whole numbers, got {told}") from None
    if found.size == 1:
        return None
    if not 0 <= found.rank < found.size:
        raise OptkitError(f"{rank}={found.rank} is none of the {found.size} ranks of {size}")
    if not found.address:
        raise OptkitError(f"{size} is {found.size}, and MASTER_ADDR is not set: it names the host of the first rank")
    return found


class Meeting:
    """A store that all commands reach, held by the first one or by its launcher."""

    def __init__(self, place: World) -> None:
        """Meet the others.

        Raises:
            OptkitError: the port is taken, or nobody is there.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        environment = {"RANK": str(place.rank), "WORLD_SIZE": str(place.size)}
        os.environ.update({**environment, "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)})
        self.place = place
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_S))))
        except (RuntimeError, ValueError, OSError) as error:
            raise OptkitError(_why(place, str(error))) from None
        self._store = PrefixStore(f"optkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._store.set_timeout(timedelta(seconds=JOIN_S))

    def tell(self, key: str, value: Any) -> None:
        """Leave something for the others."""
        self._store.set(key, json.dumps(value))

    def hear(self, key: str, who: str) -> Any:
        """Return what somebody has left, as soon as it is there.

        Raises:
            ArmError: it does not come.
        """
        try:
            found = json.loads(self._store.get(key))
        except RuntimeError:
            raise ArmError(f"{who} did not come within {JOIN_S:g} s; its own output may say why") from None
        self._store.set(f"{key} heard by {self.place.rank}", "")
        return found

    def linger(self, key: str) -> None:
        """Stay until all others have heard something, for a few seconds: the store ends with its owner."""
        with contextlib.suppress(RuntimeError):
            others = [f"{key} heard by {rank}" for rank in range(1, self.place.size)]
            self._store.wait(others, timedelta(seconds=_LINGER_S))


def _why(place: World, error: str) -> str:
    where = f"{place.address}:{place.port}"
    if "in use" in error.lower() or "EADDRINUSE" in error:
        return f"port {place.port} of {place.address} is taken; choose another one by MASTER_PORT, the same on all hosts"
    first = error.splitlines()[0] if error else "no reason given"
    if place.rank:
        return f"rank {place.rank} does not reach the first rank at {where} within {JOIN_S:g} s: {first}"
    return f"the other ranks cannot be waited for at {where}: {first}"


def own_address(place: World) -> str:
    """Return the address of this host that others reach, on the way to the first rank."""
    with socket.socket(socket.AF_INET6 if ":" in place.address else socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((place.address, place.port))
        except OSError as error:
            raise OptkitError(f"there is no way from here to {place.address}, where the first rank is: {error}") from None
        return str(way.getsockname()[0])


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an address.

    Raises:
        MissingError: none has.
    """
    import psutil

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return os.environ["GLOO_SOCKET_IFNAME"]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    raise MissingError(f"no network interface has the address {address}; name one by GLOO_SOCKET_IFNAME")


def token() -> str:
    """Return a secret that tells who belongs to this run."""
    return secrets.token_hex(16)
