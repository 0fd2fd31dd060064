"""The one table of a report, as words: rows, other arms, noise, limits, notes. Terminal, Markdown and page only draw what stands here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from optkit.report.metrics import base_of, family_of, in_order, interval, number, scale_of, spread, title_of
from optkit.report.record import Arm, Compared, Limit, Metric, Report, Scaling
from optkit.report.text import plain

BASELINE, OPTIMIZED, AGAIN, STEP = "baseline", "optimized", "baseline-again", "step-"
HEADERS = ("metric", "before", "after", "ratio (95 % interval)", "verdict")
NO_VERDICT = "-"


@dataclass(frozen=True)
class Row:
    """One metric, ready to be drawn. ``verdict`` is one of the four verdicts, ``simulated``, or a dash where none can be given."""

    metric: str
    title: str
    before: str
    after: str
    ratio: str
    verdict: str


@dataclass(frozen=True)
class Block:
    """Other arms against the same baseline: ``headers`` and ``rows`` of equal length, ``about`` says what the arms are."""

    about: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Summary:
    """All that is said about a report. Every text is one line without control characters."""

    title: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    blocks: tuple[Block, ...]
    speed: str
    noise: str
    scaling: tuple[str, ...]
    limits: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...]


def summarize(report: Report) -> Summary:
    """Return what the tables say about the report."""
    return Summary(
        title=plain(report.run.name, 120),
        facts=_facts(report),
        rows=_rows(report),
        blocks=_blocks(report),
        speed=_speed(report),
        noise=_noise(report),
        scaling=tuple(_scaled(report, entry) for entry in report.scaling),
        limits=tuple((_limit(limit), limit.held) for limit in report.limits),
        notes=_notes(report),
    )


def transforms_of(arm: Arm) -> str:
    """Return the arm's transforms in order, such as ``drop_layers > int4``; a dash for none."""
    return " > ".join(plain(step.name, 60) for step in arm.history) or "-"


def _facts(report: Report) -> tuple[str, ...]:
    model, run = report.model, report.run
    trained = "" if model.trained else ", random weights"
    lines = [f"model: {plain(model.source, 200)}, {model.parameters:,} parameters{trained}"]
    if report.data:
        judged = f"{plain(report.data.task, 60)} on {plain(report.data.corpus, 120)}, {report.data.items:,} items"
        lines.append(f"data: {judged}; {plain(report.data.description)}")
    before, after = report.arms[BASELINE], report.arms.get(OPTIMIZED)
    lines.append(f"before: {_described(before)}")
    if after:
        lines.append(f"after: {_described(after)}")
    quick = ", quick: fewer samples than a full run" if run.quick else ""
    lines.append(f"measured: {plain(run.started, 40)}, {run.seconds:.0f} s, stopped because {plain(run.stopped_because)}{quick}")
    return tuple(lines)


def _described(arm: Arm) -> str:
    ranks = f", {arm.ranks} processes" if arm.ranks > 1 else ""
    return f"{plain(arm.label, 120)}; stored in {plain(arm.dtype, 40)}{ranks}; opens in {plain(arm.opens_in, 40)}"


def _rows(report: Report) -> tuple[Row, ...]:
    before, after = report.arms[BASELINE], report.arms.get(OPTIMIZED)
    metrics = [*before.metrics, *(after.metrics if after else ())]
    return tuple(_row(report, metric, before, after) for metric in in_order(metrics))


def _row(report: Report, metric: str, before: Arm, after: Arm | None) -> Row:
    entries = [arm.metrics[metric] for arm in (before, after) if arm and metric in arm.metrics]
    unit = entries[0].unit
    scale = scale_of(unit, [entry.value for entry in entries])
    shown = {side: _value(arm, metric, scale.factor) for side, arm in (("before", before), ("after", after))}
    comparison = report.compared(OPTIMIZED, metric)
    fidelity = family_of(metric, unit) == "fidelity"
    ratio = "-" if comparison is None or fidelity else interval(comparison.ratio, comparison.low, comparison.high)
    return Row(metric, title_of(metric, scale), shown["before"], shown["after"], ratio, _verdict(after, comparison, metric, unit))


def _value(arm: Arm | None, metric: str, factor: float) -> str:
    entry = arm.metrics.get(metric) if arm else None
    return number(None if entry is None or entry.value is None else entry.value * factor)


def _verdict(arm: Arm | None, comparison: Compared | None, metric: str, unit: str) -> str:
    family = family_of(metric, unit)
    if comparison is None or family == "fidelity":
        return NO_VERDICT
    if family == "timing" and arm and arm.execution == "simulated":
        return "simulated"
    return comparison.verdict


def _blocks(report: Report, at_once: int = 2) -> tuple[Block, ...]:
    names = [name for name in report.arms if name not in (BASELINE, OPTIMIZED, AGAIN) and not name.startswith(STEP)]
    groups = [names[start : start + at_once] for start in range(0, len(names), at_once)]
    return (*_steps(report), *(_block(report, group) for group in groups))


def _steps(report: Report) -> tuple[Block, ...]:
    """Return what each step has come to and what it did by itself, where there are several."""
    names = [*(name for name in report.arms if name.startswith(STEP)), OPTIMIZED]
    if len(names) == 1 or OPTIMIZED not in report.arms:
        return ()
    speed, quality = axes_of(report)
    metrics = [metric for metric in (quality, speed, "artefact_bytes") if report.compared(OPTIMIZED, metric) is not None]
    rows, before = [], dict.fromkeys(metrics, 1.0)
    for name in names:
        cells = []
        for metric in metrics:
            entry = report.compared(name, metric)
            ratio = entry.ratio if entry else None
            exact = family_of(metric, report.arms[name].metrics[metric].unit if metric in report.arms[name].metrics else "") == "size"
            shown = number(ratio) if exact or entry is None else interval(ratio, entry.low, entry.high)
            idle = metric == speed and report.arms[name].execution == "simulated"
            share = number(ratio / before[metric]) if ratio and before[metric] else NO_VERDICT
            cells += [shown, "simulated" if idle else share]
            before[metric] = ratio or before[metric]
        steps = report.arms[name].history
        rows.append((plain(steps[-1].name, 20) if steps else name, *cells))
    headers = ("after", *(text for metric in metrics for text in (plain(metric, 20), "step")))
    about = "each step: ratios to the baseline after it; in the column beside, by how much it has changed what the step before had left"
    return (Block(about, headers, tuple(rows)),)


def axes_of(report: Report) -> tuple[str, str]:
    """Return the metrics that stand for speed and quality: per-token time and perplexity, else the first of their kind; "" for none."""
    units = {metric: entry.unit for arm in report.arms.values() for metric, entry in arm.metrics.items()}
    times = [metric for metric in in_order(units) if family_of(metric, units[metric]) == "timing" and units[metric] == "ms"]
    quality = [metric for metric in in_order(units) if family_of(metric, units[metric]) == "quality"]
    return ("tpot_ms" if "tpot_ms" in times else next(iter(times), "")), next(iter(quality), "")


def _block(report: Report, names: list[str]) -> Block:
    arms = [report.arms[name] for name in names]
    metrics = [metric for metric in in_order(metric for arm in arms for metric in arm.metrics) if _is_told(metric, arms)]
    rows = []
    for metric in metrics:
        entries = [report.arms[name].metrics[metric] for name in names if metric in report.arms[name].metrics]
        scale = scale_of(entries[0].unit, [entry.value for entry in entries])
        cells = [cell for name in names for cell in _other_cells(report, name, metric, scale.factor)]
        rows.append((title_of(metric, scale), *cells))
    about = "; ".join(f"{plain(name, 60)}: {_described(arm)}" for name, arm in zip(names, arms, strict=True))
    headers = ("other arms", *(text for name in names for text in (plain(name, 24), "ratio to before")))
    return Block(about, headers, tuple(rows))


def _other_cells(report: Report, name: str, metric: str, factor: float) -> tuple[str, str]:
    arm = report.arms[name]
    comparison = report.compared(name, metric)
    if comparison is None:
        return _value(arm, metric, factor), "-"
    simulated = arm.execution == "simulated" and family_of(metric, arm.metrics[metric].unit if metric in arm.metrics else "") == "timing"
    ratio = interval(comparison.ratio, comparison.low, comparison.high)
    return _value(arm, metric, factor), f"{ratio} simulated" if simulated else ratio


def _is_told(metric: str, arms: Iterable[Arm]) -> bool:
    entries: list[Metric] = [arm.metrics[metric] for arm in arms if metric in arm.metrics]
    return family_of(metric, entries[0].unit) != "fidelity"


def _speed(report: Report) -> str:
    after = report.arms.get(OPTIMIZED)
    if after is None:
        return "no optimized arm"
    idle = ", ".join(plain(step.name, 60) for step in after.history if step.execution == "simulated")
    if after.execution == "real":
        return f"real, but for {idle}: no kernel here gains from it" if idle else "real"
    return f"simulated ({idle or 'declared by the arm'}): no kernel here gains from it, so the times say nothing about a speed-up"


def _noise(report: Report) -> str:
    told = []
    for metric in in_order(entry.metric for entry in report.noise):
        entry = next(entry for entry in report.noise if entry.metric == metric)
        units = [arm.metrics[metric].unit for arm in report.arms.values() if metric in arm.metrics]
        if family_of(metric, units[0] if units else "") == "timing":
            judged = "" if entry.verdict == "same" else f" ({entry.verdict})"
            told.append(f"{plain(metric, 60)} {spread(entry.ratio, entry.low, entry.high)}{judged}")
    return ", ".join(told) or "not measured"


def _scaled(report: Report, entry: Scaling) -> str:
    ratio = interval(entry.ratio, entry.low, entry.high)
    if report.arms[entry.against].ranks == 1 and entry.efficiency is not None and entry.efficiency != entry.ratio:
        other = f"one process with as many threads as each of them: efficiency {number(entry.efficiency)}"
    else:
        other = f"one process with the threads of all: {entry.verdict}"
    return f"{entry.ranks} processes reach {ratio} of the {plain(entry.metric, 60)} of {other}"


def _limit(limit: Limit) -> str:
    return f"{plain(limit.metric, 60)} ratio {interval(limit.ratio)}, limit {limit.limit:g}: {'held' if limit.held else 'NOT HELD'}"


def _notes(report: Report) -> tuple[str, ...]:
    own = [f"{plain(name, 60)}: {plain(note)}" for name, arm in report.arms.items() for note in arm.notes]
    batched = {base_of(metric)[1] for arm in report.arms.values() for metric in arm.metrics} - {1}
    sizes = [f"@{size} marks batch size {size}" for size in sorted(batched)]
    return tuple(dict.fromkeys([*(plain(note) for note in report.notes), *own, *sizes]))
