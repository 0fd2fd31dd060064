"""The law of this machine, from a grid of measurements to parameters with intervals and errors on points that the fit has not seen."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from optkit.core import files
from optkit.core.environment import environment
from optkit.core.errors import OptkitError
from optkit.harness.machine import KINDS, keep_laws
from optkit.harness.processes import Workers
from optkit.measure.law import PARAMETERS, Load, Point, errors, fit
from optkit.models.sources import outline_model
from optkit.report.law import KindOfLaw, LawReport, write_law
from optkit.transforms import Plan

Progress = Callable[[str, float | None], None]
_HELD_OUT = 4  # one point of so many is not seen by the fit that is judged


def measure_law(
    kinds: Sequence[str],
    models: Sequence[str],
    prompts: Sequence[int],
    batches: Sequence[int],
    most_s: float,
    threads: int | None,
    out: Path,
    passes: int = 1,
    progress: Progress = lambda doing, share: None,
) -> tuple[Path, LawReport]:
    """Measure every model in every kind, each in a process of its own; fit, judge, write and keep the laws.

    Each pass goes over all models of a kind, so that a slow spell of the machine meets a point once; the median of the passes counts.

    Raises:
        OptkitError: a kind is not known, a model cannot be of a kind, or too few points could be measured.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise OptkitError(f"unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    count = threads or torch.get_num_threads()
    _refuse(kinds, models, count)
    folder = files.new_folder(out / "law")
    work = folder / "work"
    work.mkdir()
    found = []
    for kind in kinds:
        points: list[Point] = []
        skipped: dict[str, None] = {}
        for number, model in ((number, model) for number in range(1, passes + 1) for model in models):
            with Workers(f"{kind} {model}".replace(":", "-").replace("/", "-"), count, work) as workers:
                swept = workers.ask(
                    "sweep",
                    tell=lambda text, kind=kind, number=number: progress(f"{kind}, pass {number} of {passes}: {text}", None),  # type: ignore[misc]
                    model=model,
                    kind=kind,
                    prompts=list(prompts),
                    batches=list(batches),
                    most_s=most_s,
                )
            points += [Point(**{**each, "load": Load(**each["load"])}) for each in swept["points"]]
            skipped |= {_place(model, prompt, batch): None for prompt, batch in swept["skipped"]}
        measured = {_place(point.model, point.prompt, point.batch) for point in points}
        found.append(_judged(kind, _middle(points), [place for place in skipped if place not in measured]))
        keep_laws(count, {kind: found[-1].law})  # whatever becomes of the other kinds
    report = LawReport({**environment(), "threads": count}, tuple(found))
    write_law(report, folder)
    shutil.rmtree(work)
    files.seal(folder)
    return folder, report


def _refuse(kinds: Sequence[str], models: Sequence[str], threads: int) -> None:
    """Refuse, before anything is measured, models that cannot be of a kind: all of them at once."""
    told = []
    for model in models:
        for kind in kinds:
            outline = outline_model(model)
            try:
                for step in KINDS[kind]:
                    with torch.device("meta"):
                        step.check(Plan(outline, (1,), threads))
                        outline = step.preview(outline)
            except OptkitError as error:
                told.append(f"{model} cannot be measured as {kind}: {error}")
    if told:
        raise OptkitError("; ".join(told))


def _place(model: str, prompt: int, batch: int) -> str:
    return f"{model} prompt {prompt} batch {batch}"


def _middle(points: Iterable[Point]) -> list[Point]:
    """Return of each forward, measured in several passes, the one of median time; of two the faster."""
    same: defaultdict[tuple[str, int, int, str], list[Point]] = defaultdict(list)
    for point in points:
        same[point.model, point.prompt, point.batch, point.phase].append(point)
    return [sorted(many, key=lambda point: point.seconds)[(len(many) - 1) // 2] for many in same.values()]


def _judged(kind: str, points: list[Point], skipped: list[str]) -> KindOfLaw:
    """Fit without every fourth point, drawn from a fixed seed, and judge by these; the law that is kept has seen all."""
    order = np.random.default_rng(0).permutation(len(points))
    held = [points[index] for index in order[::_HELD_OUT]]
    seen = [points[index] for index in sorted(set(range(len(points))) - set(order[::_HELD_OUT].tolist()))]
    if len(seen) < len(PARAMETERS):
        raise OptkitError(
            f"{kind}: {len(points)} points are too few to fit {len(PARAMETERS)} parameters; name more models, prompts or batches"
        )
    off = errors(fit(seen, draws=0), held)
    return KindOfLaw(kind, fit(points), tuple(points), tuple(skipped), len(held), float(np.median(off)), float(np.percentile(off, 90)))
