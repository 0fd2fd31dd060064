"""What transforms get to see, and what is told of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.errors import OptkitWarning, telling
from optkit.core.subject import Calibration, Subject
from optkit.harness.calibration import calibration_for
from optkit.tasks.language_modeling import LanguageModeling

Subjects = Callable[..., Subject]


def test_a_model_of_random_weights_gets_random_tokens_and_the_report_says_so(subject: Subjects) -> None:
    random = replace(subject(), trained=False, tokenizer=None)
    data, told = calibration_for(random, LanguageModeling(), 0, 32)
    assert data is not None
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(4, 64), (4, 64)]
    assert told == (
        "calibrated on 512 random tokens, as quality is withheld (the weights are random): speed and memory alone mean something"
    )
    again, other = calibration_for(random, LanguageModeling(), 0, 32)[0], calibration_for(random, LanguageModeling(), 1, 32)[0]
    assert again is not None and other is not None
    assert torch.equal(again.batches[1]["input_ids"], data.batches[1]["input_ids"])
    assert not torch.equal(other.batches[1]["input_ids"], data.batches[1]["input_ids"])


def test_a_module_that_reads_no_tokens_gets_none() -> None:
    assert calibration_for(Subject(nn.Linear(4, 4), "x", kind="module", trained=False), LanguageModeling(), 0, 32) == (None, "")


def test_a_model_that_is_judged_gets_the_data_of_its_task(subject: Subjects, calibration: Calibration) -> None:
    class Given(LanguageModeling):
        def calibration(self, subject: Subject, items: int = 32) -> Calibration:
            return calibration

    assert calibration_for(subject(), Given(), 0, 32) == (calibration, "")


def test_a_warning_of_ours_is_told_and_others_go_their_way() -> None:
    told: list[Any] = []
    with pytest.warns(UserWarning, match="theirs"), telling(told.append):
        warnings.warn("ours", OptkitWarning, stacklevel=1)
        warnings.warn("ours", OptkitWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)
    assert told == ["ours", "ours"]
