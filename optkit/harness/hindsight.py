"""Plans set beside the runs that were measured on this machine: how far off they were, and why where they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optkit.core import files
from optkit.core.environment import environment
from optkit.core.errors import OptkitError
from optkit.harness.machine import known_laws
from optkit.harness.planning import plan_of
from optkit.recipe.schema import Recipe
from optkit.report.metrics import number
from optkit.report.plan import Foretold, HindsightReport, PlanReport

_METRICS = ("tpot_ms", "ttft_ms", "latency_ms")


def set_beside(plans: Sequence[PlanReport], experiments: Path) -> HindsightReport:
    """Return for each plan the ratios that it foretold, and those of the last run of its recipe on this kind of processor."""
    here = environment()["cpu"]
    rows: list[Foretold] = []
    without: list[str] = []
    for plan in plans:
        if len(plan.steps) == 1:  # a baseline alone has no ratios
            continue
        seen = _last_run(experiments / plan.recipe, here)
        if seen is None:
            without.append(plan.recipe)
            continue
        rows += [_foretold(plan, metric, seen[metric]) for metric in _METRICS if metric in seen]
    return HindsightReport(here, tuple(rows), tuple(without))


def foretold(recipe: Recipe, measured: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return a remark on a run and what the laws of this machine foretold of it; none where they are not known or do not apply."""
    if recipe.device != "cpu" or not known_laws(recipe.threads or torch.get_num_threads()):
        return []
    try:
        told = remark(plan_of(recipe), measured)
    except OptkitError:  # a model that only the run can open
        return []
    return [told] if told else []


def remark(plan: PlanReport, comparisons: Mapping[str, tuple[float, float]]) -> str | None:
    """Return how the times of a run compare with what its plan foretold, and of which parts that was made; None where it foretold none.

    Args:
        plan: of the recipe that has run.
        comparisons: before and after of the optimized arm, by metric.
    """
    told = []
    for metric in _METRICS:
        wanted = "ttft_ms" if metric == "latency_ms" else metric
        ends = [getattr(step, wanted) for step in (plan.steps[0], plan.steps[-1])]
        if metric not in comparisons or None in ends:
            continue
        before, after = comparisons[metric]
        told.append(f"{metric} {number(ends[0])} to {number(ends[1])}, measured {number(before)} to {number(after)}")
    parts = ", ".join(f"{name} {number(seconds * 1e3)}" for name, seconds in plan.steps[-1].terms.items())
    return f"foretold by the laws of this machine: {'; '.join(told)}; afterwards, in ms: {parts}" if told else None


def _last_run(folder: Path, cpu: str) -> dict[str, dict[str, Any]] | None:
    """Return the comparisons of the last finished run on this processor, by metric."""
    for run in sorted(folder.glob("[0-9]*"), reverse=True):
        place = run / "report.json"
        if not place.exists():
            continue
        report = files.read_json(place)
        if report["environment"]["cpu"] == cpu and report["environment"]["device"] == "cpu":
            return {entry["metric"]: entry for entry in report["comparisons"] if entry["arm"] == "optimized" and entry["ratio"]}
    return None


def _foretold(plan: PlanReport, metric: str, seen: dict[str, Any]) -> Foretold:
    wanted = "ttft_ms" if metric == "latency_ms" else metric  # a forward pass is planned as a prompt
    first, last = plan.steps[0], plan.steps[-1]
    before, after = (getattr(step, wanted) for step in (first, last))
    return Foretold(plan.recipe, metric, before, seen["before"], after, seen["after"], seen["ratio"], seen["low"], seen["high"], _why(plan))


def _why(plan: PlanReport) -> str:
    """Return what a plan has warned of, or what keeps it from foretelling."""
    told = [warning for step in plan.steps for warning in step.warnings]
    nameless = [step.unlawful or step.name for step in (plan.steps[-1], plan.steps[0]) if step.kind is None]
    return "; ".join(told or [f"no law for {name}" for name in nameless[:1]])
