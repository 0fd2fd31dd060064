"""Questions with a few possible answers, after none or some examples: what a causal model makes of them, by the answers' likelihood."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Calibration, Kind, Subject
from optkit.data.choices import Choice, python_choices, shots_of
from optkit.data.sides import Sides
from optkit.tasks.contract import DataCard, Task
from optkit.tasks.likelihood import beginning, encoded, likelihoods
from optkit.tasks.lm_eval_tasks import answers_right
from optkit.tasks.windows import cut, prompts_of, spread, stream_of

_KEPT = "choices.safetensors"


class HarnessTasks(Settings):
    """Tasks of lm-evaluation-harness that have options to choose from, such as hellaswag or arc_easy."""

    lm_eval: tuple[str, ...] = Field(min_length=1, description="names of tasks of the installed package")


class FewShot(Task):
    """Accuracy by number of examples (Brown et al. 2020, arXiv 2005.14165); the answer is the most likely option, by token."""

    kinds: ClassVar[tuple[Kind, ...]] = ("causal-lm",)
    corpus: Literal["python"] | HarnessTasks = Field(
        default="python", description="'python' are three kinds of questions on the standard library's sources"
    )
    items: Annotated[int, Field(ge=1)] = Field(
        default=300, description="questions that are evaluated, at most; of the harness, in each task"
    )
    shots: tuple[Annotated[int, Field(ge=0, le=64)], ...] = Field(default=(0, 1, 4), min_length=1, description="numbers of examples")

    @cached_property
    def sides(self) -> Sides[Choice]:
        """The questions, read once."""
        found = python_choices()
        chosen = np.linspace(0, len(found.evaluation) - 1, min(len(found.evaluation), self.items)).round().astype(int)
        return replace(found, evaluation=[found.evaluation[row] for row in chosen])

    def look(self) -> None:
        """Read the questions."""
        if isinstance(self.corpus, str):
            self.sides.of("evaluation")

    def withheld(self, subject: Subject) -> str | None:
        """Random weights and models without a tokenizer are not judged."""
        return super().withheld(subject) or ("the model has no tokenizer" if subject.tokenizer is None else None)

    def card(self, subject: Subject) -> DataCard:
        """Describe the questions."""
        if isinstance(self.corpus, HarnessTasks):
            detail = {"shots": " ".join(map(str, self.shots)), "digest": "of the names alone", "items": "at most"}
            names = ", ".join(self.corpus.lm_eval)
            digest = hashlib.sha256(f"{names} {self.items}".encode()).hexdigest()
            return DataCard("few-shot", f"lm-evaluation-harness: {names}", digest, self.items * len(self.corpus.lm_eval), detail)
        kinds = sorted({item.kind for item in self.sides.evaluation})
        detail = {"kinds": " ".join(kinds), "shots": " ".join(map(str, self.shots))}
        return DataCard("few-shot", self.sides.name, self.sides.sha256("evaluation"), len(self.sides.evaluation), detail)

    def calibration(self, subject: Subject, items: int = 32) -> Calibration:
        """Return windows of the examples that prompts are made of."""
        text = "".join(item.example for item in self.sides.calibration)
        return Calibration(
            tuple({"input_ids": rows} for rows in spread(cut(stream_of(subject.tokenizer, [text]), 128, None), items).split(4))
        )

    @torch.inference_mode()
    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Return a row a question: whether each number of examples led to the right answer, and whether it was the baseline's."""
        if isinstance(self.corpus, HarnessTasks):
            names = self.corpus.lm_eval
            found = [answers_right(subject, engine, names, count, self.items) for count in self.shots]
            chosen = torch.tensor(
                [[right for _, right in rows] for rows in found]
            ).T.contiguous()  # all that is told is whether it was right
            columns = {f"right_{count}": chosen[:, place].double().numpy() for place, count in enumerate(self.shots)}
        else:
            questions = self.sides.evaluation
            given = [self._chosen(subject, engine, item) for item in questions[group.rows(len(questions))]]
            chosen = torch.tensor(group.join(given))
            right = torch.tensor([item.right for item in questions])
            columns = {f"right_{count}": (chosen[:, place] == right).double().numpy() for place, count in enumerate(self.shots)}
        if keep is not None and group.rank == 0:
            save_file({"chosen": chosen}, keep / _KEPT)
        if reference is not None:
            columns["same"] = (load_file(reference / _KEPT)["chosen"] == chosen).double().mean(1).numpy()
        return columns

    def metrics(self) -> tuple[Metric, ...]:
        """Return the accuracy for each number of examples, and the agreement with the baseline."""
        return (
            *(_accuracy(count) for count in self.shots),
            Metric("agreement", "share", True, lambda c: c["same"].mean(-1), lambda c: c["same"], relative=True),
        )

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        """Return stretches of examples; for a subject without a tokenizer, random ids from a fixed seed."""
        text = "" if subject.tokenizer is None else "".join(item.example for item in self.sides.evaluation)
        return prompts_of(subject, lambda: stream_of(subject.tokenizer, [text]), count, length)

    def _chosen(self, subject: Subject, engine: Any, item: Choice) -> list[int]:
        """Return the number of the most likely option after each number of examples."""
        tokenizer = subject.tokenizer
        options = [encoded(tokenizer, option) for option in item.options]
        texts = [shots_of(item, self.sides, count) + item.question for count in self.shots]
        rows = [(beginning(tokenizer) + encoded(tokenizer, text), option) for text in texts for option in options]
        means = torch.tensor([found.nats / found.tokens for found in likelihoods(subject, engine, rows)])
        chosen: list[int] = means.view(len(texts), len(options)).argmax(1).tolist()
        return chosen


def _accuracy(shots: int) -> Metric:
    name = f"right_{shots}"
    return Metric(f"accuracy_{shots}_shot", "share", True, lambda c: c[name].mean(-1), lambda c: c[name])
