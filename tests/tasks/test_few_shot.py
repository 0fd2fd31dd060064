"""Questions after examples: the most likely option wins, and more of a pattern makes a model that copies right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.models.sources import reference_tokenizer
from optkit.tasks.few_shot import FewShot


class Oracle:
    """Gives one token all the likelihood: the first of the answer that it was told for a question, else a fixed one."""

    def __init__(self, tokenizer: Any, task: FewShot, knows_from: int) -> None:
        self._tokenizer, self._knows_from = tokenizer, knows_from
        self._answers = {item.question.strip(): item.options[item.right] for item in task.sides.evaluation}

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, len(self._tokenizer))
        for row, each in enumerate(ids.tolist()):
            lines = self._tokenizer.decode(each).split("\n")
            for end in range(1, len(each)):
                text = self._tokenizer.decode(each[:end])
                question = text.split("\n")[-1].strip()
                if question in self._answers and text.count("\n") >= self._knows_from:
                    logits[row, end - 1, self._tokenizer(self._answers[question], add_special_tokens=False)["input_ids"][0]] = 20
            assert lines
        return logits


def test_a_model_that_needs_an_example_has_none_without_it(tmp_path: Path) -> None:
    task = FewShot(shots=(0, 1))
    few = [item for item in task.sides.evaluation if item.kind == "classes"][:12]
    task.__dict__["sides"] = replace(task.sides, evaluation=few)
    tokenizer = reference_tokenizer()
    subject = Subject(SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer))), "oracle", kind="causal-lm", tokenizer=tokenizer)  # type: ignore[arg-type]
    columns = task.evaluate(subject, Oracle(tokenizer, task, 1), Group(), None, tmp_path)
    assert columns["right_1"].mean() == 1
    assert columns["right_0"].mean() < 0.5
    again = task.evaluate(subject, Oracle(tokenizer, task, 1), Group(), tmp_path, None)
    assert again["same"].tolist() == [1.0] * 12
    assert [metric.name for metric in task.metrics()] == ["accuracy_0_shot", "accuracy_1_shot", "agreement"]


def test_calibration_is_made_of_examples_and_not_of_questions() -> None:
    task = FewShot()
    tokenizer = reference_tokenizer()
    subject = Subject(SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer))), "own", kind="causal-lm", tokenizer=tokenizer)  # type: ignore[arg-type]
    text = tokenizer.decode(torch.cat([batch["input_ids"] for batch in task.calibration(subject, 4).batches]).flatten())
    assert any(item.example.strip() in text for item in task.sides.calibration)
    assert not any(item.example.strip() in text for item in task.sides.evaluation if item.kind == "firsts")
    assert task.prompts(subject, 3, 20).shape == (3, 20)


def test_no_number_of_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="shots"):
        FewShot(shots=())
