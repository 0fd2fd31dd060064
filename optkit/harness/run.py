"""One trial from recipe to report: artefacts, quality, turns at the clock, verdicts. Finished stages are kept, so that a run can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optkit.core.errors import OptkitError, StoppedError
from optkit.harness import stages
from optkit.harness.agent import serve
from optkit.harness.assembly import assemble
from optkit.harness.checking import check_metrics, check_recipe, refuse_small_disk
from optkit.harness.folder import RunFolder
from optkit.harness.hosts import HERE, Hosts
from optkit.harness.inputs import inputs_of, quickened
from optkit.harness.joining import Meeting, world
from optkit.harness.remote import JoinedHosts
from optkit.harness.workloads import build_workload
from optkit.models.artefact import kind_of
from optkit.recipe.reading import load_recipe, recipe_from_dict
from optkit.recipe.schema import Recipe
from optkit.report.folder import write_report
from optkit.report.record import Report
from optkit.tasks import Task

Progress = Callable[[str, float | None], None]
"""Told what is being done, and the share of that which is done, where it is known."""


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path = "experiments",
    quick: bool = False,
    resume: bool = False,
    overrides: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    workload: str | None = None,
    progress: Progress = lambda doing, share: None,
    command: str | None = None,
) -> Report:
    """Apply a recipe to its model, measure before and after, and write the run's folder.

    Args:
        recipe: a file, plain data, or a recipe.
        out: the folder of experiments; the run goes to ``out/<recipe name>/<number>``.
        quick: fewer samples, for a first look; the report says so.
        resume: go on with the latest unfinished run of this recipe instead of beginning a new one.
        overrides: ``path=value`` texts, for a recipe file.
        trust_remote_code: let the model's own code run; recorded in the report.
        workload: ``module:function`` of an importable function that returns (module, task), for models that no recipe can name.
        progress: told what is being done.
        command: how the user called it, for the record.

    Returns:
        the report; ``report.held`` says whether the limits of the recipe held.

    Raises:
        OptkitError: bad input, a resource that is missing, or a measuring process that failed; the message says what to do.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    wanted, name = _wanted(recipe, overrides, quick)
    progress("checking the recipe", None)
    parent = Path(out) / wanted.name
    try:
        with ExitStack() as stack:
            hosts = stack.enter_context(_hosts(wanted, progress))
            task = _checked(wanted, name, Path(out), trust_remote_code, workload)
            inputs = inputs_of(wanted, quick, trust_remote_code, workload)
            folder = stack.enter_context(RunFolder.resumed(parent, inputs) if resume else RunFolder.new(parent, inputs))
            results = stages.Stages(wanted, folder, inputs["threads"], trust_remote_code, workload, progress, hosts).all()
            progress("writing the report", None)
            report = assemble(
                wanted,
                task,
                results,
                inputs,
                run_id=folder.path.name,
                started=started,
                seconds=time.monotonic() - clock,
                quick=quick,
                command=command,
            )
            _seal(folder, report, wanted)
            hosts.finish(0 if report.held else 1)
    except KeyboardInterrupt as stop:
        raise _stopped(stop, parent, command if not resume else None) from None
    return report


def _seal(folder: RunFolder, report: Report, recipe: Recipe) -> None:
    """Write what stays of a run, and let go of the rest."""
    folder.keep_artefact("optimized")
    write_report(report, folder.path, recipe.to_yaml())
    folder.finish()


def lend(recipe: str | Path, overrides: tuple[str, ...] = (), quick: bool = False, progress: Progress = lambda doing, share: None) -> int:
    """Lend this place to the first of several commands that were started together, and return the exit code that it gives.

    Raises:
        OptkitError: this is no such command; the first one does not come; or the recipes differ.
    """
    wanted, _ = _wanted(recipe, overrides, quick)
    place = world()
    if place is None or place.rank == 0:
        raise OptkitError("only a rank other than the first has something to lend")
    progress(f"rank {place.rank} of {place.size}: working for rank 0 at {place.address}", None)
    return serve(Meeting(place), wanted.sha256())


@contextmanager
def _hosts(recipe: Recipe, progress: Progress) -> Iterator[Hosts]:
    """Give the places for processes: this host, and those of the commands that were started with this one."""
    place = world()
    if place is None:
        yield HERE
        return
    if place.rank:
        raise OptkitError(f"rank {place.rank} lends its place to rank 0, which runs the recipe: call optkit.harness.run.lend")
    progress(f"waiting for {place.size} ranks at {place.address}:{place.port}", None)
    with JoinedHosts(Meeting(place), recipe.sha256()) as hosts:
        yield hosts


def _wanted(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: tuple[str, ...], quick: bool) -> tuple[Recipe, str]:
    wanted, name = _read(recipe, overrides)
    return (quickened(wanted) if quick else wanted), name


def _stopped(stop: KeyboardInterrupt, parent: Path, command: str | None) -> StoppedError:
    again = f"go on with: {command} --resume" if command else "go on with --resume"
    return StoppedError(f"stopped; what is finished is kept in {parent}: {again}", getattr(stop, "exit_code", 130))


def _checked(recipe: Recipe, name: str, out: Path, trust_remote_code: bool, workload: str | None) -> Task:
    """Refuse what cannot work, as far as that can be known without weights, and return the task that judges."""
    if workload is None:
        checked = check_recipe(recipe, name, trust_remote_code)
        refuse_small_disk(checked.disk_bytes, out)
        return checked.task
    module, task = build_workload(workload)
    check_metrics(recipe, name, task, kind_of(module))
    return task


def _read(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: tuple[str, ...]) -> tuple[Recipe, str]:
    if overrides and not isinstance(recipe, str | Path):
        raise OptkitError("overrides work on recipe files; change the recipe itself")
    if isinstance(recipe, Recipe):
        return recipe, recipe.name
    if isinstance(recipe, Mapping):
        made = recipe_from_dict(recipe)
        return made, made.name
    return load_recipe(recipe, overrides), str(recipe)
