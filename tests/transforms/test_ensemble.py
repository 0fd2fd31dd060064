"""Several models that answer together, from the recipe's step to an artefact that opens again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines import EagerEngine
from optkit.models.sources import outline_model
from optkit.transforms import Ensemble, Int8

Subjects = Callable[..., Subject]
Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture
def data(tiny_llama: Llama) -> Calibration:
    """Return what opens a model of another depth by its seed."""
    return Calibration((), open_model=lambda spec: tiny_llama(seed=int(spec), num_hidden_layers=2))


def test_their_logits_are_averaged(subject: Subjects, tiny_llama: Llama, logits: Logits, data: Calibration) -> None:
    both = Ensemble(models=("4",)).apply(subject(), data)
    expected = (logits(subject().module) + logits(tiny_llama(seed=4, num_hidden_layers=2))) / 2
    torch.testing.assert_close(logits(both.module), expected)


def test_step_by_step_with_their_caches_the_answers_are_those_of_full_forwards(subject: Subjects, data: Calibration, ids: Tensor) -> None:
    both = Ensemble(models=("4", "5")).apply(subject(), data).module
    engine = EagerEngine(both)
    found = torch.stack([engine.prefill(ids[:, :4]), *(engine.step(column) for column in ids[:, 4:].T)], 1)
    torch.testing.assert_close(found, engine.score(ids)[:, 3:], rtol=1e-4, atol=1e-4)
    assert engine.cache_bytes() == sum(2 * 2 * 2 * 12 * 16 * 4 * blocks for blocks in (3, 2, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_saved_and_opened_again(subject: Subjects, logits: Logits, data: Calibration, tmp_path: Path, packed: bool) -> None:
    both = Ensemble(models=("4",)).apply(subject(), data)
    both = Int8().apply(both) if packed else both
    optkit.save(both, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    assert torch.equal(logits(again.module), logits(both.module))
    assert again.tokenizer is not None
    assert outline_model(str(tmp_path / "saved")).history == both.history


def test_models_of_other_tokens_are_refused(subject: Subjects, tiny_llama: Llama) -> None:
    other = Calibration((), open_model=lambda spec: tiny_llama(vocab_size=50))
    with pytest.raises(TransformError, match=r"model './b' knows 50 tokens and this one 96: they cannot answer together"):
        Ensemble(models=("./b",)).apply(subject(), other)
    with pytest.raises(TransformError, match="ensemble opens its models in a recipe"):
        Ensemble(models=("./b",)).apply(subject())
