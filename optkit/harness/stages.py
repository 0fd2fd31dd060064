"""The stages of a run, each kept when it is finished: baseline, optimized, references, quality of each arm, timing at each batch size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from optkit.core import files
from optkit.harness.folder import RunFolder
from optkit.harness.processes import Workers
from optkit.harness.trial import Schedule, take_turns
from optkit.measure.latency import Latency
from optkit.models.artefact import MANIFEST
from optkit.recipe.schema import Recipe

BASELINE, OPTIMIZED, AGAIN = "baseline", "optimized", "baseline-again"
_REFERENCES = ("bfloat16", "float32")
Progress = Callable[[str, float | None], None]


class Stages:
    """Runs what is not finished yet, each stage in processes of its own."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, threads: int, trust_remote_code: bool, workload: str | None, progress: Progress
    ) -> None:
        self._recipe = recipe
        self._plain = recipe.to_dict()
        self._folder = folder
        self._threads = threads
        self._trust = trust_remote_code
        self._workload = workload
        self._progress = progress

    def all(self) -> dict[str, Any]:
        """Return the results of all stages, as plain data."""
        baseline = self._folder.stage(
            BASELINE, lambda: self._prepare(BASELINE, self._recipe.baseline.dtype if self._recipe.baseline else None)
        )
        optimized = self._folder.stage(OPTIMIZED, self._transform)
        results: dict[str, Any] = {"baseline": baseline, "artefacts": {BASELINE: self._size(BASELINE), OPTIMIZED: self._size(OPTIMIZED)}}
        references = [] if self._workload else [dtype for dtype in _REFERENCES if dtype != baseline["dtype"]]
        for dtype in references:
            self._folder.stage(dtype, partial(self._prepare, dtype, dtype))
            results["artefacts"][dtype] = self._size(dtype)
        results["ranks"] = {OPTIMIZED: optimized["replicas"], **dict.fromkeys([BASELINE, AGAIN, *references], baseline["replicas"])}
        results["quality"] = self._qualities(baseline, references) if "quality" in self._recipe.measure else {}
        results["timing"], results["opened"] = self._timings(baseline["kind"], references, results["ranks"])
        return results

    def _prepare(self, name: str, dtype: str | None) -> Any:
        with self._workers(name) as worker:
            return worker.ask(
                "baseline",
                tell=self._tell(name),
                recipe=self._plain,
                folder=str(self._folder.work / name),
                dtype=dtype,
                trust_remote_code=self._trust,
                workload=self._workload,
            )

    def _transform(self) -> Any:
        with self._workers(OPTIMIZED) as worker:
            return worker.ask(
                "transform",
                tell=self._tell(OPTIMIZED),
                recipe=self._plain,
                baseline=str(self._folder.work / BASELINE),
                folder=str(self._folder.work / OPTIMIZED),
                workload=self._workload,
            )

    def _qualities(self, baseline: dict[str, Any], references: list[str]) -> dict[str, Any]:
        if baseline["card"] is None:
            return {}
        found = {BASELINE: self._folder.stage("answers", lambda: self._evaluate(BASELINE, 1, None))}
        for name in (OPTIMIZED, *references):
            found[name] = self._folder.stage(f"quality-{name}", partial(self._evaluate, name, self._replicas(name), "answers"))
        return found

    def _evaluate(self, name: str, ranks: int, reference: str | None) -> Any:
        self._progress(f"judging the quality of {name}", None)
        with self._workers(name, ranks) as workers:
            workers.ask("open", recipe=self._plain, folder=str(self._folder.work / name), workload=self._workload)
            if reference is not None:
                return workers.ask("evaluate", reference=str(self._folder.work / reference), keep=None)
            with files.build_folder(self._folder.work / "answers") as aside:
                return workers.ask("evaluate", reference=None, keep=str(aside))

    def _timings(self, kind: str, references: list[str], ranks: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Open every arm, let them take turns at each batch size, and ask for their memory at the end."""
        meter = self._recipe.measure.get("latency")
        sizes = list(meter.batch_sizes) if isinstance(meter, Latency) else []
        kept = {size: self._folder.work / f"timing-{size}.json" for size in sizes}
        if all(path.exists() for path in kept.values()) and (self._folder.work / "opened.json").exists():
            return {str(size): files.read_json(path) for size, path in kept.items()}, files.read_json(self._folder.work / "opened.json")
        with ExitStack() as stack:
            arms = {}
            for name in (BASELINE, OPTIMIZED, AGAIN, *references):
                self._progress(f"opening {name}", None)
                arms[name] = stack.enter_context(self._workers(name, ranks[name]))
                place = self._folder.work / (BASELINE if name == AGAIN else name)
                with arms[name].awake():
                    answer = arms[name].ask("open", recipe=self._plain, folder=str(place), workload=self._workload)
                arms[name].facts = answer
            timing = {str(size): self._folder.stage(f"timing-{size}", partial(self._timing, arms, size, kind)) for size in sizes}
            opened = self._folder.stage("opened", lambda: {name: self._facts(workers) for name, workers in arms.items()})
        return timing, opened

    def _timing(self, arms: dict[str, Workers], size: int, kind: str) -> Any:
        meter = self._recipe.measure["latency"]
        assert isinstance(meter, Latency)
        generates = kind == "causal-lm"
        schedule = Schedule(size, meter.blocks_per_round(generates), meter.judged(size, generates), meter.precision, meter.seconds)
        first = {name: arms[name] for name in (BASELINE, OPTIMIZED, AGAIN)}
        rest = {name: workers for name, workers in arms.items() if name not in first}
        timed = take_turns(first, rest, schedule, self._plain, self._progress)
        return {"rounds": timed.rounds, "stopped_because": timed.stopped_because, "warm_up_ms": timed.warm_up_ms}

    def _facts(self, workers: Workers) -> dict[str, Any]:
        with workers.awake():
            memory = workers.ask_all("memory")
            roof = workers.ask("roof", size_bytes=workers.facts["weight_bytes_per_token"])
        return {**workers.facts, "memory": memory, "roof_bytes_per_second": roof["bytes_per_second"]}

    def _workers(self, name: str, ranks: int = 1) -> Workers:
        return Workers(name, self._threads, self._folder.work, ranks)

    def _replicas(self, name: str) -> int:
        replicas: int = files.read_json(self._folder.work / name / MANIFEST)["replicas"]
        return replicas

    def _size(self, name: str) -> int:
        listed = files.read_json(self._folder.work / name / MANIFEST)["files"]
        return sum(int(entry["size"]) for entry in listed.values())

    def _tell(self, name: str) -> Callable[[str], None]:
        return lambda text: self._progress(f"{name}: {text}", None)
