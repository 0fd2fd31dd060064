"""From the stages' results to the report: metrics, comparisons with their verdicts, the noise floor, limits and notes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from optkit.core.measurement import Comparison, Measurement, Metric, Samples
from optkit.core.subject import GENERATING
from optkit.harness import statistics
from optkit.harness.hindsight import foretold
from optkit.harness.stages import AGAIN, BASELINE, ONE, OPTIMIZED, STEP
from optkit.harness.trial import REFERENCE_EVERY, columns_of
from optkit.measure.latency import Latency, sized
from optkit.measure.scenarios import scenarios_of
from optkit.recipe.schema import Recipe
from optkit.report import record
from optkit.tasks import Task

_QUALITY_MARGIN = 0.001  # as much as another batch size or another processor changes
_SERVED = ("assistant_", "documents_")
_LEAST_APART = 0.05
_TOLERANCES = {"peak_memory_bytes": 0.02, "artefact_bytes": 0.001}


@dataclass(frozen=True)
class _Sampled:
    """The samples of one metric. ``every``: this arm has the baseline's clusters number 0, every, 2 every, ..."""

    metric: Metric
    columns: Samples
    every: int = 1
    margin: float = 0.0
    timed: bool = False

    def measured(self) -> Measurement:
        return statistics.measure(self.metric, self.columns)


class _Arms:
    """Samples and counted numbers of every arm, by metric."""

    def __init__(self) -> None:
        self.sampled: dict[str, dict[str, _Sampled]] = {}
        self.counted: dict[str, dict[str, Measurement]] = {}

    def sample(self, arm: str, sampled: _Sampled) -> None:
        self.sampled.setdefault(arm, {})[sampled.metric.name] = sampled

    def count(self, arm: str, name: str, unit: str, value: float, higher_is_better: bool = False, **detail: Any) -> None:
        self.counted.setdefault(arm, {})[name] = Measurement(name, unit, value, (value,), higher_is_better, detail)

    def rises(self, metric: str) -> bool:
        """Say whether more of this metric is better."""
        sampled, counted = self.sampled.get(BASELINE, {}).get(metric), self.counted[BASELINE].get(metric)
        return sampled.metric.higher_is_better if sampled else counted is not None and counted.higher_is_better

    def measurements(self, arm: str) -> dict[str, record.Metric]:
        sampled = [one.measured() for one in self.sampled.get(arm, {}).values()]
        return {found.metric: record.Metric.of(found) for found in (*sampled, *self.counted.get(arm, {}).values())}


def assemble(
    recipe: Recipe,
    task: Task,
    results: dict[str, Any],
    inputs: dict[str, Any],
    *,
    run_id: str,
    started: datetime,
    seconds: float,
    quick: bool,
    command: str | None,
) -> record.Report:
    """Return the report of a run whose stages are finished."""
    arms = _gather(recipe, task, results)
    names = list(results["opened"])
    noise = [replace(entry, verdict=statistics.noise_verdict(_as_ratio(entry))) for entry in _compare(arms, AGAIN, {})]
    floors = {entry.metric: entry for entry in noise}
    comparisons = [entry for name in names if name not in (BASELINE, AGAIN) for entry in _compare(arms, name, floors)]
    simulated = results["opened"][OPTIMIZED]["execution"] == "simulated"
    limits = _limits(recipe, arms, comparisons, simulated)
    card = results["baseline"]["card"]
    return record.Report(
        run=record.Run(
            id=run_id,
            name=recipe.name,
            started=started.isoformat(timespec="seconds"),
            seconds=seconds,
            quick=quick,
            recipe_sha256=recipe.sha256(),
            stopped_because="; ".join(dict.fromkeys(part["stopped_because"] for part in results["timing"].values())),
            command=command,
        ),
        environment={**inputs["environment"], "threads": inputs["threads"], "device": "cpu"},
        model=record.Model(
            source=results["baseline"]["source"],
            parameters=results["opened"][BASELINE]["parameters"],
            sha256=inputs["model_sha256"] or results["baseline"]["sha256"],
            trained=results["baseline"]["trained"],
        ),
        data=None if card is None or not results["quality"] else _data(card),
        arms={name: _arm(name, results, arms) for name in names if name != AGAIN},
        comparisons=tuple(record.Compared.of(entry) for entry in comparisons),
        noise=tuple(record.Compared.of(entry) for entry in noise),
        limits=limits,
        scaling=tuple(_scaling(recipe, arms, results)),
        notes=_notes(recipe, results, arms),
    )


def _gather(recipe: Recipe, task: Task, results: dict[str, Any]) -> _Arms:
    arms = _Arms()
    meter = recipe.measure.get("latency")
    generates = results["baseline"]["kind"] in GENERATING
    for size, timing in results["timing"].items():
        assert isinstance(meter, Latency)
        for name, rounds in timing["rounds"].items():
            every = 1 if name in (BASELINE, OPTIMIZED, AGAIN) else REFERENCE_EVERY
            for metric in meter.metrics(int(size), generates):
                arms.sample(name, _Sampled(metric, columns_of(rounds), every, timed=True))
            if generates and not meter.mix:
                _count_cache(arms, name, int(size), meter, [rank["cache_bytes"] for rank in timing["memory"][name]])
    for name, lists in results["quality"].items():
        columns = {key: np.array(values, dtype=np.float64) for key, values in lists.items()}  # null is NaN
        for metric in task.metrics():
            if not (metric.relative and name == BASELINE):
                arms.sample(name, _Sampled(metric, columns, margin=_QUALITY_MARGIN))
    for meter, served in results["scenarios"].items():
        units = scenarios_of(recipe.measure)[meter].units()
        for name, found in served.items():
            for metric, value in found["values"].items():
                arms.count(name, metric, units[metric][0], value, units[metric][1])
            arms.count(name, f"{meter}_peak_bytes", "bytes", found["peak_bytes"])
    for name, facts in results["opened"].items():
        _count(arms, name, facts, results, "memory" in recipe.measure)
    return arms


def _count(arms: _Arms, name: str, facts: dict[str, Any], results: dict[str, Any], memory: bool) -> None:
    if memory and results["timing"]:
        served = [timing["memory"][name] for timing in results["timing"].values()]
        arms.count(
            name,
            "peak_memory_bytes",
            "bytes",
            max(sum(rank["peak_bytes"] for rank in ranks) for ranks in served),
            ranks=facts["ranks"],
            runtime_bytes=sum(rank["runtime_bytes"] for rank in served[0]),
            opening_peak_bytes=facts["opening_peak_bytes"],
        )
        if any(facts["ranks"] > 1 for facts in results["opened"].values()):
            each = [max(part) for part in zip(*([rank["peak_bytes"] for rank in ranks] for ranks in served), strict=True)]
            arms.count(name, "peak_rank_memory_bytes", "bytes", max(each), by_rank=each)
    if facts["parts"] > 1 and results["timing"]:
        for size, timing in results["timing"].items():
            waiting = [rank["waiting"] for rank in timing["memory"][name]]
            arms.count(name, sized("communication_share", int(size)), "share", sum(waiting) / len(waiting), by_rank=waiting)
    if name in results["artefacts"]:
        arms.count(name, "artefact_bytes", "bytes", results["artefacts"][name])
    arms.count(name, "weight_bytes_per_token", "bytes", facts["weight_bytes_per_token"])
    tpot = arms.sampled.get(name, {}).get("tpot_ms")
    if tpot is not None:
        value = tpot.measured().value
        bandwidth = facts["weight_bytes_per_token"] / value * 1e3
        roof = facts["roof_bytes_per_second"]
        arms.count(name, "read_bandwidth", "bytes/s", bandwidth, True)
        arms.count(name, "roof_share", "share", bandwidth / roof, True, roof_bytes_per_second=roof)


def _count_cache(arms: _Arms, name: str, batch_size: int, meter: Latency, ranks: list[int]) -> None:
    """Count what the cache of a request held at its end, when the last token was generated and not yet fed back."""
    positions = meter.prompt_tokens + meter.new_tokens - 1
    each = sum(ranks) / (positions * batch_size)
    arms.count(name, sized("cache_bytes", batch_size), "bytes", sum(ranks), positions=positions, bytes_per_position=each)


def _compare(arms: _Arms, name: str, floors: dict[str, Comparison]) -> list[Comparison]:
    """Return the comparisons of one arm with the baseline, for every metric that both have."""
    found = []
    baseline = arms.sampled.get(BASELINE, {})
    for key, mine in arms.sampled.get(name, {}).items():
        if key in baseline:
            before = {column: values[:: mine.every] for column, values in baseline[key].columns.items() if column in mine.columns}
            floor = floors.get(key)
            found.append(statistics.compare(name, mine.metric, before, mine.columns, _as_ratio(floor) if floor else None, mine.margin))
    served = _apart(arms)
    for key, before_count in arms.counted.get(BASELINE, {}).items():
        after_count = arms.counted.get(name, {}).get(key)
        if after_count is not None and key not in ("read_bandwidth", "roof_share"):
            found.append(statistics.compare_exact(name, before_count, after_count, _TOLERANCES.get(key, served.get(key, 0.0))))
    return found


def _apart(arms: _Arms) -> dict[str, float]:
    """Return how far apart the baseline was from itself in each metric of a workload, at least a twentieth."""
    again = arms.counted.get(AGAIN, {})
    found = {}
    for key, before in arms.counted.get(BASELINE, {}).items():
        if key in again and key.startswith(_SERVED):
            both = sorted((before.value, again[key].value))
            found[key] = max(_LEAST_APART, both[1] / both[0] - 1 if both[0] > 0 else math.inf)
    return found


def _scaling(recipe: Recipe, arms: _Arms, results: dict[str, Any]) -> Iterator[record.Scaling]:
    """Compare the throughput of several ranks with that of one, and with that of one process with all their threads."""
    opened = results["opened"]
    ranks = opened[OPTIMIZED]["ranks"]
    if ranks == 1:
        return
    steps = [name for name in opened if name.startswith(STEP) and opened[name]["ranks"] == 1]
    for name in ((steps or [BASELINE])[-1], ONE):
        for key, other in arms.sampled.get(name, {}).items():
            mine = arms.sampled.get(OPTIMIZED, {}).get(key)
            if mine is None or not key.startswith(("tokens_per_second", "items_per_second")):
                continue
            after = {column: values[:: other.every] for column, values in mine.columns.items()}
            found = statistics.compare(OPTIMIZED, mine.metric, other.columns, after)
            yield record.Scaling.of(found, name, ranks, 1 if name == ONE else ranks)


def _as_ratio(entry: Comparison) -> statistics.Ratio | None:
    if entry.ratio is None or entry.low is None or entry.high is None:
        return None
    half_width = math.log(entry.high / entry.low) / 2 if entry.low > 0 else math.inf
    return statistics.Ratio(entry.before, entry.after, math.log(entry.ratio), half_width)


def _arm(name: str, results: dict[str, Any], arms: _Arms) -> record.Arm:
    facts = results["opened"][name]
    warm_up = {size: round(timing["warm_up_ms"][name], 1) for size, timing in results["timing"].items()}
    notes = [f"first request, not counted: {', '.join(f'{ms} ms at batch {size}' for size, ms in warm_up.items())}"] if warm_up else []
    notes += [f"{key}: {facts[key]}" for key in ("engine", "kernels") if facts[key]]
    return record.Arm(
        label=", ".join(step["name"] for step in facts["history"]) or "untouched",
        history=tuple(record.StepRecord(**step) for step in facts["history"]),
        execution=facts["execution"],
        opens_in=facts["opens_in"],
        dtype=facts["dtype"],
        ranks=facts["ranks"],
        notes=tuple(notes),
        metrics=arms.measurements(name),
    )


def _limits(recipe: Recipe, arms: _Arms, comparisons: list[Comparison], simulated: bool) -> tuple[record.Limit, ...]:
    """Judge the limits; a simulated speed holds none."""
    mine = {entry.metric: entry for entry in comparisons if entry.arm == OPTIMIZED}
    timed = {entry.metric.name for entry in arms.sampled.get(OPTIMIZED, {}).values() if entry.timed}
    limits = []
    for metric, limit in recipe.limits.items():
        ratio = mine[metric].ratio if metric in mine else None
        held = ratio is not None and (ratio >= limit if arms.rises(metric) else ratio <= limit)
        held = held and not (simulated and metric in timed)
        limits.append(record.Limit(metric=metric, limit=limit, ratio=ratio, held=held))
    return tuple(limits)


def _data(card: dict[str, Any]) -> record.Data:
    described = ", ".join(f"{name} {value}" for name, value in card["detail"].items())
    return record.Data(task=card["task"], corpus=card["corpus"], sha256=card["sha256"], items=card["items"], description=described)


def _notes(recipe: Recipe, results: dict[str, Any], arms: _Arms) -> tuple[str, ...]:
    notes = []
    if results["baseline"]["withheld"]:
        notes.append(f"quality is withheld: {results['baseline']['withheld']}")
    notes += results["notes"]
    measured = {*arms.sampled.get(OPTIMIZED, {}), *arms.counted.get(OPTIMIZED, {})}
    unknown = [name for name in recipe.limits if name not in measured]
    if unknown:
        notes.append(f"limits on metrics that were not measured do not hold: {', '.join(unknown)}; measured: {', '.join(sorted(measured))}")
    ends = {
        name: (before.measured().value, arms.sampled[OPTIMIZED][name].measured().value)
        for name, before in arms.sampled.get(BASELINE, {}).items()
        if before.timed and name in arms.sampled.get(OPTIMIZED, {})
    }
    return (*notes, *_last_step(recipe, arms), *foretold(recipe, ends))


def _last_step(recipe: Recipe, arms: _Arms) -> Iterator[str]:
    """Tell what the last of several steps did to the time that is judged, in the rounds that the arm before it took part in."""
    before = arms.sampled.get(f"{STEP}{len(recipe.transforms) - 1}", {})
    for key in before.keys() & {"tpot_ms", "latency_ms", "mix_ms"}:
        other, mine = before[key], arms.sampled[OPTIMIZED][key]
        after = {column: values[:: other.every] for column, values in mine.columns.items()}
        found = statistics.ratio(mine.metric, other.columns, after)
        if found is not None:
            name, rounds = recipe.transforms[-1].step().name, len(next(iter(other.columns.values())))
            ends = f"{math.exp(found.log):.3g} [{found.low:.3g}, {found.high:.3g}]"
            yield f"{name} by itself, against what stood before it: {key} {ends}, in {rounds} rounds"
