"""What a worker can be asked to do: one method a command, prefixed ``do_``. Arguments and results are plain JSON."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from optkit.core import files
from optkit.core.device import CPU, device_of
from optkit.core.errors import telling
from optkit.core.group import Group
from optkit.core.mesh import ALONE
from optkit.core.subject import GENERATING, Calibration, Subject
from optkit.engines import NativeEngine, engine_for, told
from optkit.engines.offloading import is_offloaded
from optkit.engines.parallel.connect import part_for
from optkit.engines.parallel.part import Part
from optkit.harness.calibration import calibration_for
from optkit.harness.machine import KINDS
from optkit.harness.teaching import taught
from optkit.harness.workloads import build_workload, supervised, task_for
from optkit.measure.contract import Opened, Session
from optkit.measure.memory import forget_peak, peak_bytes, resident_bytes
from optkit.measure.stages import profile
from optkit.measure.sweep import sweep
from optkit.measure.traffic import parameters_of, read_bandwidth, weight_bytes_per_token
from optkit.models import artefact
from optkit.models.networks import Network
from optkit.models.sources import open_model
from optkit.recipe.reading import recipe_from_dict
from optkit.recipe.schema import Recipe
from optkit.transforms import Dtype

Tell = Callable[[str], None]
_PATIENCE_S = 1800  # while another rank saves, or computes; one that hangs is noticed by the parent


class Arm:
    """One process, perhaps one of several ranks, and what it has opened."""

    def __init__(self, rank: int, ranks: int, meeting: str, threads: int, tell: Tell) -> None:
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # of NumPy and SciPy, which a forked process has with the threads of its server
        self._tell = tell if rank == 0 else lambda text: None
        self._group = _join(rank, ranks, meeting)
        self._device = CPU
        self._opened: Opened | None = None
        self._part: Part | None = None
        self._sessions: dict[int, Session] = {}
        self._busy_s = self._waited_s = 0.0  # in the blocks of the session in progress, and in their waits for other parts
        self._runtime_bytes = 0

    def do_baseline(
        self, recipe: dict[str, Any], folder: str, dtype: str | None, trust_remote_code: bool, workload: str | None
    ) -> dict[str, Any]:
        """Open the recipe's model, cast it where asked, and save it as an artefact."""
        if self._group.rank:
            return {}  # one process is enough to open a model and save it
        wanted = recipe_from_dict(recipe)
        self._tell("opening the model")
        if workload is None:
            subject = self._untouched(wanted, trust_remote_code)
        else:
            module, _ = build_workload(workload)
            subject = Subject(module, source=workload, kind=artefact.kind_of(module))
        if dtype is not None:
            subject = replace(subject, module=Dtype(dtype=dtype).apply(subject.module))  # type: ignore[arg-type]
        self._tell("saving it")
        artefact.save(subject, folder)
        task = task_for(wanted, subject.kind, workload)
        withheld = task.withheld(subject)
        return {
            "card": None if withheld else asdict(task.card(subject)),
            "withheld": withheld,
            "trained": subject.trained,
            "kind": subject.kind,
            "source": subject.source,
            "ranks": subject.mesh.size,
            "dtype": _dtypes(subject.module),
            "sha256": _digest_of_weights(Path(folder)),
        }

    def _untouched(self, recipe: Recipe, trust_remote_code: bool) -> Subject:
        if isinstance(recipe.model, Network):
            return artefact.load(taught(recipe.model, supervised(recipe), recipe.seed, self._tell).artefact)
        return open_model(recipe.model, trust_remote_code, recipe.seed)

    def do_transform(
        self, recipe: dict[str, Any], baseline: str, folder: str, between: list[str], checkpoints: str, workload: str | None
    ) -> dict[str, Any]:
        """Open the baseline's artefact, apply the recipe's transforms, and save the result; after each but the last, what is there by then.

        ``between`` are the folders of the latter, one for each transform but the last. Where several processes prepare, for a training that
        they share, all do the same, and the first one saves.
        """
        wanted = recipe_from_dict(recipe)
        subject = _load(baseline, workload)
        task = task_for(wanted, subject.kind, workload)
        seen: dict[int, Calibration | None] = {}
        notes: list[str] = []
        ranks: list[int] = []
        for number, step in enumerate(wanted.transforms, 1):
            doing = f"applying {step.step().name} ({number} of {len(wanted.transforms)})"
            self._tell(doing)
            data: Calibration | None = None
            if step.needs_data:
                if step.data_items not in seen:
                    seen[step.data_items], told = calibration_for(subject, task, wanted.seed, step.data_items)
                    notes += [told] if told and told not in notes else []
                found = seen[step.data_items]
                data = found and replace(
                    found,
                    untouched=lambda: _load(baseline, workload).module,
                    open_model=lambda spec: open_model(spec).module,
                    group=self._group if step.processes > 1 else Group(),
                    checkpoints=Path(checkpoints) / f"{number}-{step.step().name}",
                    tell=lambda text, doing=doing: self._tell(f"{doing}: {text}"),  # type: ignore[misc]
                )
            with telling(notes.append):
                subject = step.apply(subject, data)
            if number < len(wanted.transforms):
                if self._group.rank == 0:
                    artefact.save(subject, between[number - 1])
                ranks.append(subject.mesh.size)
        for note in notes:
            self._tell(note)
        self._tell("saving the result")
        if self._group.rank == 0:
            artefact.save(subject, folder)
        history = [asdict(step) for step in subject.history]
        return {"history": history, "ranks": subject.mesh.size, "between": ranks, "notes": notes}

    def do_open(self, recipe: dict[str, Any], folder: str, workload: str | None, alone: bool = False) -> dict[str, Any]:
        """Open an artefact as the arm to measure, or this process's part of it; ``alone``: all of it, whatever it says of itself."""
        wanted = recipe_from_dict(recipe)
        self._device = device_of(wanted.device)
        self._runtime_bytes = resident_bytes(self._device)
        mesh, history = artefact.placement(folder)
        mesh = ALONE if alone else mesh
        self._group = self._group.arranged(mesh)
        self._part = part = part_for(self._group, mesh, history)
        subject = _load(folder, workload, part, self._device)
        if not is_offloaded(subject.module):
            subject = replace(subject, module=subject.module.to(self._device))
        self._opened = Opened(subject, engine_for(subject, part), task_for(wanted, subject.kind, workload))
        return {
            "history": [asdict(step) for step in subject.history],
            "execution": subject.execution,
            "opens_in": subject.opens_in,
            "dtype": _dtypes(subject.module),
            "parameters": parameters_of(subject.module),
            "ranks": self._group.size,
            "parts": mesh.parts,
            "opening_peak_bytes": peak_bytes(self._device),
            "weight_bytes_per_token": weight_bytes_per_token(subject.module),
            "engine": told(self._opened.engine, part),
            "kernels": _kernels(subject.module, self._device),
        }

    def do_evaluate(self, reference: str | None, keep: str | None) -> dict[str, Any]:
        """Judge the opened subject; the samples come back as lists, with None for what is not finite."""
        arm = self._arm()
        columns = arm.task.evaluate(
            arm.subject, arm.engine, self._group, Path(reference) if reference else None, Path(keep) if keep else None
        )
        return {name: _plain(np.asarray(column).tolist()) for name, column in columns.items()}

    def do_session(self, recipe: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Begin a timed measurement at one batch size and warm it up by a whole request; the time of that is told apart."""
        meter = recipe_from_dict(recipe).measure["latency"]
        session = meter.session(self._arm(), batch_size, self._group)  # type: ignore[attr-defined]
        generates = self._arm().subject.kind in GENERATING
        if generates:
            self._arm().engine.reset()  # a rank without a sequence of this batch would still hold one of the last
        warm_up = [session.block() for _ in range(meter.blocks_per_round(generates))]  # type: ignore[attr-defined]
        self._sessions[batch_size] = session
        self._busy_s = self._waited_s = 0.0
        forget_peak(self._device)
        return {"warm_up_ms": sum(sum(times) for block in warm_up for times in block.values())}

    def do_block(self, batch_size: int) -> dict[str, Any]:
        """Do the next block of a timed measurement."""
        waited, start = self._waits(), time.perf_counter()
        times = dict(self._sessions[batch_size].block())
        self._busy_s += time.perf_counter() - start
        self._waited_s += self._waits() - waited
        return times

    def do_scenario(self, recipe: dict[str, Any], meter: str) -> dict[str, Any]:
        """Serve a workload of a recipe, and return its numbers with the peak memory of this process meanwhile."""
        forget_peak(self._device)
        found = recipe_from_dict(recipe).measure[meter].serve(self._arm())  # type: ignore[attr-defined]
        return {"values": found, "peak_bytes": peak_bytes(self._device)}

    def do_profile(self, prompt_tokens: int, new_tokens: int, batch_size: int, rounds: int) -> dict[str, Any]:
        """Return where the time of requests to the opened subject goes."""
        return asdict(profile(self._arm(), prompt_tokens, new_tokens, batch_size, rounds))

    def do_sweep(self, model: str, kind: str, prompts: list[int], batches: list[int], most_s: float) -> dict[str, Any]:
        """Open a model as it is of some kind, and return its times over a grid."""
        subject = open_model(model)
        for step in KINDS[kind]:
            subject = step.apply(subject)
        engine = engine_for(subject)
        return asdict(sweep(model, subject.module, engine, prompts, batches, most_s, self._tell, isinstance(engine, NativeEngine)))

    def do_memory(self) -> dict[str, Any]:
        """Return this rank's peak resident memory since serving began, what the empty runtime took, what its cache holds now, and the
        share of the last session's time that it has waited for other parts of the model.
        """
        generates = self._opened is not None and self._opened.subject.kind in GENERATING
        held = self._arm().engine.cache_bytes() if generates else 0
        waiting = self._waited_s / self._busy_s if self._busy_s else 0.0
        return {"peak_bytes": peak_bytes(self._device), "runtime_bytes": self._runtime_bytes, "cache_bytes": held, "waiting": waiting}

    def do_roof(self, size_bytes: int) -> dict[str, Any]:
        """Return the read bandwidth that this process reaches on a buffer of this size."""
        return {"bytes_per_second": read_bandwidth(size_bytes, device=self._device)}

    def _waits(self) -> float:
        """Return the seconds so far in sums over shards and in messages of stages."""
        if self._part is None:
            return 0.0
        sums = self._part.peers.waited_s if self._part.peers is not None else 0.0
        return sums + float(getattr(self._arm().engine, "waited_s", 0.0))

    def _arm(self) -> Opened:
        assert self._opened is not None, "open comes first"
        return self._opened


def _join(rank: int, ranks: int, meeting: str) -> Group:
    if ranks == 1:
        return Group()
    import torch.distributed as dist
    from accelerate import PartialState

    limit = timedelta(seconds=_PATIENCE_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=limit)
    state = PartialState(cpu=True)
    return Group(state.process_index, state.num_processes)


def _load(folder: str, workload: str | None, part: Part | None = None, device: torch.device | None = None) -> Subject:
    """Open an artefact: to serve on a device, or all of it in memory, to be changed."""
    how: dict[str, Any] = {"whole": True} if device is None else {"device": device}
    if workload is None or artefact.opens_alone(folder):  # a layer less, and the workload's own module would no longer fit
        return artefact.load(folder, part=part, **how)
    return artefact.load(folder, build_workload(workload)[0], part, **how)


def _digest_of_weights(folder: Path) -> str:
    listed = files.read_json(folder / artefact.MANIFEST)["files"]
    lines = [f"{name} {listed[name]['sha256']}\n" for name in sorted(listed) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return numbers, in lists of any depth, with None for what JSON has no word for."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if math.isfinite(value) else None


def _dtypes(module: torch.nn.Module) -> str:
    sizes: dict[str, int] = {}
    for tensor in artefact.distinct_tensors(module).values():
        key = str(tensor.dtype).removeprefix("torch.")
        sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()
    total = sum(sizes.values())
    main = sorted((name for name in sizes if sizes[name] * 50 >= total), key=lambda name: -sizes[name])
    return "+".join(main)


def _kernels(module: torch.nn.Module, device: torch.device) -> str | None:
    if not any(hasattr(layer, "weight_bytes") for layer in module.modules()):
        return None
    if device.type == "cuda":
        how = "int4 by tinygemm where inputs are bfloat16 and the sizes fit; all else is turned into floats at every call unless compiled"
        return f"{torch.cuda.get_device_name(device)}: {how}"
    from optkit.kernels.native import explain
    from optkit.kernels.sparse import SparseLinear, explain_sparse

    sparse = any(isinstance(layer, SparseLinear) for layer in module.modules())
    return f"{explain()}; {explain_sparse()}" if sparse else explain()
