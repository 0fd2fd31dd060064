"""The stages of a run, each kept when it is finished: baseline, optimized, references, quality of each arm, timing at each batch size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import psutil

from optkit.core import files
from optkit.core.errors import OptkitError
from optkit.core.subject import GENERATING
from optkit.harness.folder import RunFolder
from optkit.harness.hosts import HERE, Hosts
from optkit.harness.processes import LazyWorkers, Workers
from optkit.harness.trial import Schedule, take_turns
from optkit.measure.latency import Latency
from optkit.measure.scenarios import scenarios_of
from optkit.models.artefact import MANIFEST
from optkit.recipe.schema import Recipe

BASELINE, OPTIMIZED, AGAIN, STEP, ONE = "baseline", "optimized", "baseline-again", "step-", "one-process"
_REFERENCES = ("bfloat16", "float32")
_QUALITY, _SCENARIO = "quality-", "scenario-"
_ALWAYS = (BASELINE, OPTIMIZED, AGAIN)
_RUNTIME_BYTES = 600 * 2**20  # Python with its libraries in each process, and what a request takes
_SPARE_BYTES = _MOST_SWEPT_BYTES = 2**30  # more than caches hold
Progress = Callable[[str, float | None], None]


class Stages:
    """Runs what is not finished yet, each stage in processes of its own."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        threads: int,
        trust_remote_code: bool,
        workload: str | None,
        progress: Progress,
        hosts: Hosts = HERE,
    ) -> None:
        self._recipe = recipe
        self._plain = recipe.to_dict()
        self._folder = folder
        self._threads = threads
        self._trust = trust_remote_code
        self._workload = workload
        self._progress = progress
        self._hosts = hosts

    def all(self) -> dict[str, Any]:
        """Return the results of all stages, as plain data."""
        baseline, optimized, references = self._prepare_all()
        steps = dict(zip(self._between(), optimized["between"], strict=True))
        names = [BASELINE, OPTIMIZED, AGAIN, *([ONE] if optimized["ranks"] > 1 else []), *steps, *references]
        ranks = dict.fromkeys(names, baseline["ranks"]) | {OPTIMIZED: optimized["ranks"]} | steps | {ONE: 1}
        left_out = self._folder.stage("left-out", lambda: self._unaffordable(names, ranks))
        names = [name for name in names if name not in left_out]
        references = names[3:]
        pending = [stage for stage in self._measuring(baseline, references) if not self._folder.has(stage)]
        with ExitStack() as stack:
            arms = self._open(names, ranks, stack) if pending else {}
            timing = {
                str(size): self._folder.stage(f"timing-{size}", partial(self._timing, arms, size, baseline["kind"]))
                for size in self._sizes()
            }
            opened = self._folder.stage("opened", lambda: {name: self._facts(workers) for name, workers in arms.items()})
            quality = {
                stage.removeprefix(_QUALITY): self._folder.stage(stage, partial(self._evaluate, arms, stage.removeprefix(_QUALITY)))
                for stage in self._measuring(baseline, references)
                if stage.startswith(_QUALITY)
            }
            served = {
                meter: self._folder.stage(f"{_SCENARIO}{meter}", partial(self._serve, arms, meter))
                for meter in scenarios_of(self._recipe.measure)
            }
            sizes = self._folder.stage("sizes", lambda: {name: self._size(name) for name in names if name not in (AGAIN, ONE)})
        notes = list(optimized.get("notes", []))
        if left_out:
            notes.append(f"left out, as the memory of this machine does not hold all arms at once: {', '.join(left_out)}")
        return {
            "baseline": baseline,
            "artefacts": sizes,
            "timing": timing,
            "opened": opened,
            "quality": quality,
            "scenarios": served,
            "notes": notes,
        }

    def prepared(self) -> list[str]:
        """Save the artefacts of baseline and result, and return the names of these arms; without transforms there is the baseline alone.

        Raises:
            OptkitError: the result is served by several processes together, or its preparation failed.
        """
        _, optimized, _ = self._prepare_all(references=False)
        if optimized["ranks"] > 1:
            raise OptkitError("stages are measured in one process, and this recipe shares its model among several; leave that step out")
        return [BASELINE, OPTIMIZED] if self._recipe.transforms else [BASELINE]

    @contextmanager
    def opened(self, name: str) -> Iterator[Workers]:
        """Give the process of an arm that has been prepared, by itself."""
        with self._workers(name) as workers:
            workers.facts = workers.ask("open", recipe=self._plain, folder=str(self._folder.work / name), workload=self._workload)
            yield workers

    def _measuring(self, baseline: dict[str, Any], references: list[str]) -> list[str]:
        """Return the names of the stages that need the arms to be open, in order; the baseline is judged before the others."""
        judged = "quality" in self._recipe.measure and baseline["card"] is not None
        quality = [f"{_QUALITY}{name}" for name in (BASELINE, OPTIMIZED, *references) if name != ONE] if judged else []
        served = [f"{_SCENARIO}{meter}" for meter in scenarios_of(self._recipe.measure)]
        return [*(f"timing-{size}" for size in self._sizes()), "opened", *quality, *served]

    def _unaffordable(self, names: list[str], ranks: dict[str, int]) -> list[str]:
        """Return the last of the names, those that memory does not hold beside the others; never baseline, result and noise."""
        if self._hosts is not HERE or self._recipe.device != "cpu":
            return []
        free = psutil.virtual_memory().available - _SPARE_BYTES
        needed = [self._size({AGAIN: BASELINE, ONE: OPTIMIZED}.get(name, name)) + ranks[name] * _RUNTIME_BYTES for name in names]
        return [name for name, sum_ in zip(names, accumulate(needed), strict=True) if sum_ > free and name not in _ALWAYS]

    def _sizes(self) -> tuple[int, ...]:
        meter = self._recipe.measure.get("latency")
        return meter.batch_sizes if isinstance(meter, Latency) else ()

    def _prepare_all(self, references: bool = True) -> tuple[Any, Any, list[str]]:
        """Save the artefacts of all arms, one after another in one process."""
        ranks = max([step.processes for step in self._recipe.transforms], default=1)
        with LazyWorkers(lambda: self._preparing(ranks)) as worker:
            dtype = self._recipe.baseline.dtype if self._recipe.baseline else None
            baseline = self._folder.stage(BASELINE, partial(self._prepare, worker, BASELINE, dtype))
            optimized = self._folder.stage(OPTIMIZED, partial(self._transform, worker))
            others = [name for name in _REFERENCES if name != baseline["dtype"]] if references and not self._workload else []
            for name in others:
                self._folder.stage(name, partial(self._prepare, worker, name, name))
        return baseline, optimized, others

    def _prepare(self, worker: LazyWorkers, name: str, dtype: str | None) -> Any:
        return worker().ask(
            "baseline",
            tell=self._tell(name),
            recipe=self._plain,
            folder=str(self._folder.work / name),
            dtype=dtype,
            trust_remote_code=self._trust,
            workload=self._workload,
        )

    def _between(self) -> list[str]:
        """Return the names of the arms that stand between baseline and result: after each transform but the last."""
        return [f"{STEP}{number}" for number in range(1, len(self._recipe.transforms))]

    def _transform(self, worker: LazyWorkers) -> Any:
        between = [self._folder.work / name for name in self._between()]
        for folder in between:
            shutil.rmtree(folder, ignore_errors=True)  # of a stage that was interrupted
        return worker().ask(
            "transform",
            tell=self._tell(OPTIMIZED),
            recipe=self._plain,
            baseline=str(self._folder.work / BASELINE),
            folder=str(self._folder.work / OPTIMIZED),
            between=[str(folder) for folder in between],
            checkpoints=str(self._folder.work / "checkpoints"),
            workload=self._workload,
        )

    def _open(self, names: list[str], ranks: dict[str, int], stack: ExitStack) -> dict[str, Workers]:
        """Open every arm from its artefact, in its own process, all at once; afterwards all stand still."""
        self._progress(f"starting {sum(ranks[name] for name in names)} processes", None)
        arms = {name: stack.enter_context(self._workers(name, ranks[name], ranks[OPTIMIZED] if name == ONE else 1)) for name in names}
        for name, workers in arms.items():
            place = self._folder.work / {AGAIN: BASELINE, ONE: OPTIMIZED}.get(name, name)
            workers.send("open", recipe=self._plain, folder=str(place), workload=self._workload, alone=name == ONE)
        for name, workers in arms.items():
            self._progress(f"opening {name}", None)
            workers.facts = _together(workers.gather())
            workers.pause()
        return arms

    def _evaluate(self, arms: dict[str, Workers], name: str) -> Any:
        self._progress(f"judging the quality of {name}", None)
        answers = self._folder.work / "answers"
        with arms[name].awake():
            if name != BASELINE:
                return arms[name].ask("evaluate", reference=str(answers), keep=None)
            shutil.rmtree(answers, ignore_errors=True)  # of a stage that was interrupted
            with files.build_folder(answers) as aside:
                return arms[name].ask("evaluate", reference=None, keep=str(aside))

    def _serve(self, arms: dict[str, Workers], meter: str) -> Any:
        """Let each arm serve a workload, the baseline a second time at the end, so that its noise is known."""
        found = {}
        for name in (BASELINE, OPTIMIZED, AGAIN):
            self._progress(f"{meter}: {name}", None)
            with arms[name].awake():
                found[name] = arms[name].ask("scenario", recipe=self._plain, meter=meter)
        return found

    def _timing(self, arms: dict[str, Workers], size: int, kind: str) -> Any:
        meter = self._recipe.measure["latency"]
        assert isinstance(meter, Latency)
        generates = kind in GENERATING
        schedule = Schedule(size, meter.blocks_per_round(generates), meter.judged(size, generates), meter.precision, meter.seconds)
        first = {name: arms[name] for name in (BASELINE, OPTIMIZED, AGAIN)}
        rest = {name: workers for name, workers in arms.items() if name not in first}
        timed = take_turns(first, rest, schedule, self._plain, self._progress)
        # Asked here and not later: a process that is started by a resumed run has not served at this size.
        memory = {name: self._memory(workers) for name, workers in arms.items()}
        return {"rounds": timed.rounds, "stopped_because": timed.stopped_because, "warm_up_ms": timed.warm_up_ms, "memory": memory}

    def _memory(self, workers: Workers) -> list[Any]:
        with workers.awake():
            return workers.ask_all("memory")

    def _facts(self, workers: Workers) -> dict[str, Any]:
        with workers.awake():
            parts = workers.facts["parts"]
            swept = min(workers.facts["weight_bytes_per_token"] // parts, _MOST_SWEPT_BYTES)
            roofs = workers.ask_all("roof", size_bytes=swept)[:parts]
        return {**workers.facts, "roof_bytes_per_second": sum(roof["bytes_per_second"] for roof in roofs)}

    def _preparing(self, ranks: int) -> Workers:
        """Start the processes that prepare; several share the cores, unless the recipe says how many threads each shall have."""
        threads = self._threads if self._recipe.threads else max(1, self._threads // ranks)
        return Workers("preparing", threads, self._folder.work, ranks, self._hosts)

    def _workers(self, name: str, ranks: int = 1, threads: int = 1) -> Workers:
        """Start the processes of an arm, each with the threads of the recipe, or so many times as many."""
        return Workers(name, self._threads * threads, self._folder.work, ranks, self._hosts)

    def _size(self, name: str) -> int:
        listed = files.read_json(self._folder.work / name / MANIFEST)["files"]
        return sum(int(entry["size"]) for entry in listed.values())

    def _tell(self, name: str) -> Callable[[str], None]:
        return lambda text: self._progress(f"{name}: {text}", None)


def _together(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of an arm, from those of its ranks: what the parts of one copy hold is added up."""
    first = facts[0]
    copy = facts[: first["parts"]]
    summed = {key: sum(one[key] for one in copy) for key in ("parameters", "weight_bytes_per_token")}
    return {**first, **summed, "opening_peak_bytes": max(one["opening_peak_bytes"] for one in facts)}
