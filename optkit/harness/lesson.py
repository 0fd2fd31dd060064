"""A training by itself, from recipe to scores: the network of a recipe against the answer that takes no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from optkit.core.errors import OptkitError
from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.engines import engine_for
from optkit.harness import statistics
from optkit.harness.checking import check_recipe
from optkit.harness.teaching import is_taught, taught
from optkit.harness.workloads import supervised
from optkit.models import artefact
from optkit.models.networks import Network
from optkit.recipe.reading import load_recipe
from optkit.report.training import Score, Training

Progress = Callable[[str, float | None], None]


def train(recipe: str | Path, overrides: tuple[str, ...] = (), progress: Progress = lambda doing, share: None) -> Training:
    """Train the network of a recipe where that was not done before, and judge it on the evaluated items.

    Raises:
        OptkitError: the recipe's model is no network that is trained here; its data is missing or broken.
    """
    wanted = load_recipe(recipe, overrides)
    if not isinstance(wanted.model, Network):
        raise OptkitError(f"{recipe}: model {wanted.model!r} is no network that is trained here; there is nothing to train")
    progress("checking the recipe", None)
    check_recipe(wanted.model_copy(update={"transforms": ()}), str(recipe))
    torch.set_num_threads(wanted.threads or torch.get_num_threads())
    task = supervised(wanted)
    if is_taught(wanted.model, task, wanted.seed):
        progress("trained already: found in the cache", None)
    found = taught(wanted.model, task, wanted.seed, lambda text: progress(text, None))
    subject = artefact.load(found.artefact)
    progress("judging", None)
    after = task.evaluate(subject, engine_for(subject), Group(), None, None)
    name, before = task.trivial(subject.tokenizer)
    metrics = [metric for metric in task.metrics() if not metric.relative and _is_known(metric, before)]
    card = task.card(subject)
    return Training(
        network=subject.source,
        task=task.word(),
        corpus=card.corpus,
        parameters=sum(parameter.numel() for parameter in subject.module.parameters()),
        items={side: len(task.sides.of(side)) for side in ("training", "validation", "calibration", "evaluation")},
        steps=found.record["steps"],
        best=found.record["best"],
        trivial=name,
        scores=tuple(_score(metric, before, after) for metric in metrics),
        artefact=str(found.artefact),
    )


def _score(metric: Metric, before: Samples, after: Samples) -> Score:
    """Set the trained network against the trivial answer: by their ratio, or by their intervals where there is none."""
    found = statistics.compare("trained", metric, before, after)
    trivial, trained = (statistics.interval(metric, side)[1:] for side in (before, after))
    if found.ratio is None and (trained[0] > trivial[1] or trained[1] < trivial[0]):
        better = (trained[0] > trivial[1]) is metric.higher_is_better
        found = replace(found, verdict="better" if better else "worse")
    return Score(found, trivial, trained)


def _is_known(metric: Metric, columns: Samples) -> bool:
    """Say whether an answer that takes no model has this score: some give no likelihoods."""
    try:
        metric.estimate({name: column[None] for name, column in columns.items()})
    except KeyError:
        return False
    return True
