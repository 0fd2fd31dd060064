"""Tasks of EleutherAI's lm-evaluation-harness, answered by an engine of ours: what is measured is what is served.

Names of tasks are data; definitions of tasks can name code, so that only those of the installed package are read.
"""

from __future__ import annotations

from typing import Any

from optkit.core.errors import DataError, MissingError
from optkit.core.subject import Subject
from optkit.tasks.likelihood import beginning, encoded, likelihoods


def answers_right(
    subject: Subject, engine: Any, names: tuple[str, ...], shots: int, items: int, task_manager: Any = None
) -> list[tuple[str, float]]:
    """Return for each question, in order, its task and number, and whether the most likely option was right.

    Args:
        subject: the model, with its tokenizer.
        engine: what executes it.
        names: tasks of the harness.
        shots: examples in each prompt.
        items: questions of each task, at most.
        task_manager: where tasks are looked for; default: in the installed package.

    Raises:
        MissingError: the package lm-eval is not installed, or a data set cannot be reached.
        DataError: a task is not known, or has no accuracy.
    """
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingError("tasks of lm-evaluation-harness need the package 'lm-eval': pip install 'optkit[lm-eval]'") from None
    manager = task_manager or TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"lm-evaluation-harness has no task {unknown[0]!r}")
    try:
        found = evaluator.simple_evaluate(
            model=_adapter(subject, engine),
            tasks=list(names),
            num_fewshot=shots,
            limit=items,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    except (OSError, ConnectionError) as error:
        raise MissingError(f"the data of {', '.join(names)} cannot be reached: {str(error).splitlines()[0]}") from None
    rows = []
    for task, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            if "acc" not in sample:
                raise DataError(f"task {task!r} of lm-evaluation-harness has no accuracy; name others")
            rows.append((f"{task} {sample['doc_id']}", float(sample["acc"])))
    return rows


def _adapter(subject: Subject, engine: Any) -> Any:
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]
        """Gives the harness likelihoods; it generates nothing."""

        def loglikelihood(self, requests: Any, **how: Any) -> list[tuple[float, bool]]:
            """Return (log likelihood, is greedy) for each (context, continuation)."""
            rows = []
            for context, rest in (request.args for request in requests):
                prompt = beginning(subject.tokenizer) + encoded(subject.tokenizer, context)
                rows.append((prompt or [subject.tokenizer.eos_token_id], encoded(subject.tokenizer, rest)))
            return [(found.nats, found.greedy) for found in likelihoods(subject, engine, rows)]

        def loglikelihood_rolling(self, requests: Any, **how: Any) -> list[float]:
            """Refuse: perplexity is measured by language-modeling."""
            raise DataError("tasks of lm-evaluation-harness that measure perplexity are not run; use language-modeling")

        def generate_until(self, requests: Any, **how: Any) -> list[str]:
            """Refuse: these tasks have no options to choose from."""
            raise DataError("tasks of lm-evaluation-harness that generate are not run; name some with options to choose from")

    return Adapter()
