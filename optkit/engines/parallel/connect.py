"""Brings the processes together that hold one model: over shared memory on one host, else by ``torch.distributed``."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optkit.core.group import Group
from optkit.core.mesh import Mesh
from optkit.core.subject import Step
from optkit.engines.parallel.part import Part
from optkit.kernels.native import native
from optkit.kernels.peers import DistributedPeers, Peers, SharedPeers, shared_file

_BOOT, _VIEW = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/mnt")


def part_for(group: Group, mesh: Mesh, history: Iterable[Step]) -> Part | None:
    """Return what this process holds of a model, connected to the others; None where each process has a copy of its own.

    All processes of the group call this together, with a process group of ``torch.distributed`` already there.
    """
    if mesh.parts == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    devices = init_device_mesh("cpu", (mesh.data, mesh.pipeline, mesh.tensor), mesh_dim_names=("data", "pipeline", "tensor"))
    place = mesh.place(group.rank)
    settings: dict[str, Any] = next((dict(step.settings) for step in history if step.name == "pipeline_parallel"), {})
    return Part(
        mesh,
        place,
        _peers(devices.get_group("tensor"), place.tensor, mesh.tensor) if mesh.tensor > 1 else None,
        devices.get_group("pipeline") if mesh.pipeline > 1 else None,
        tuple(settings.get("stages", ())),
        int(settings.get("micro_batches", 1)),
    )


def _peers(line: Any, rank: int, size: int) -> Peers:
    import torch.distributed as dist

    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, (_host(), native() is not None), group=line)
    if len(set(hosts)) > 1 or not hosts[0][1]:
        return DistributedPeers(line, rank, size)
    names: list[Any] = [str(shared_file(size)) if rank == 0 else None]
    try:
        dist.broadcast_object_list(names, group=line, group_src=0)
        peers = SharedPeers(Path(names[0]), rank, size)
        dist.barrier(group=line)
    finally:
        if rank == 0:
            Path(names[0]).unlink(missing_ok=True)
    return peers


def _host() -> str:
    """Return what tells this host, and the view of its files that processes have in common, from others: a container has its own."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    view = _VIEW.readlink() if _VIEW.is_symlink() else ""
    return f"{socket.gethostname()} {boot} {view}"
