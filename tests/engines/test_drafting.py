"""Guesses of another model change nothing but the time."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from optkit.core.errors import ProblemsError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines import DraftEngine, EagerEngine, NativeEngine, engine_for, told
from optkit.kernels.native import native
from optkit.recipe.reading import recipe_from_dict
from optkit.transforms import Draft, Int4
from optkit.transforms.runtime.variant import Variant


def tokens_of(engine: Any, ids: torch.Tensor, count: int = 24) -> list[list[int]]:
    first = engine.first(ids)
    return [first.tolist(), *(token.tolist() for token in engine.further(first, count - 1))]


@pytest.mark.parametrize("alike", [True, False], ids=["a draft that knows", "a draft that does not"])
@pytest.mark.parametrize("kind", [EagerEngine, pytest.param(NativeEngine, marks=pytest.mark.skipif(native() is None, reason="no kernels"))])
def test_the_tokens_are_those_of_the_model_alone(tiny_llama: Any, ids: torch.Tensor, kind: Any, alike: bool) -> None:
    module = tiny_llama()
    engine = DraftEngine(module, kind(deepcopy(module) if alike else tiny_llama(seed=7, num_hidden_layers=2)), tokens=4)
    for row in ids:
        for count in (1, 2, 24):
            assert tokens_of(engine, row[None], count) == tokens_of(EagerEngine(module), row[None], count)
    assert engine.guessed > 0
    assert engine.accepted == engine.guessed if alike else engine.accepted < engine.guessed / 2
    assert tokens_of(engine, ids, 8) == tokens_of(EagerEngine(module), ids, 8)  # several sequences: without guesses


def test_a_step_beside_the_guesses_gives_the_logits_of_the_model(tiny_llama: Any, ids: torch.Tensor) -> None:
    module = tiny_llama()
    engine, plain = DraftEngine(module, EagerEngine(deepcopy(module))), EagerEngine(module)
    torch.testing.assert_close(engine.prefill(ids[:1]), plain.prefill(ids[:1]))
    torch.testing.assert_close(engine.step(ids[0, :1]), plain.step(ids[0, :1]))
    assert engine.cache_bytes() > plain.cache_bytes()
    engine.reset()
    assert engine.cache_bytes() == 0


def test_a_variant_of_the_untouched_model_guesses_for_the_changed_one(subject: Any, ids: torch.Tensor) -> None:
    plain = subject()
    changed = Int4(group_size=32).apply(plain)
    data = Calibration(untouched=lambda: deepcopy(subject().module), open_model=lambda spec: subject().module)
    found = Draft(variant=Variant(bits=8, drop_layers=(1,))).apply(changed, data)
    model, other = found.module.members
    assert len(model.model.layers) == 3 and len(other.model.layers) == 2
    engine = engine_for(found)
    assert isinstance(engine, DraftEngine) and "guessed by another model's" in str(told(engine))
    assert tokens_of(engine, ids[:1]) == tokens_of(EagerEngine(changed.module), ids[:1])


def test_what_cannot_guess_is_refused(subject: Any, tiny_llama: Any) -> None:
    data = Calibration(untouched=lambda: subject().module, open_model=lambda spec: tiny_llama(vocab_size=50))
    with pytest.raises(TransformError, match=r"model './other' knows 50 tokens and this one 96"):
        Draft(model="./other").apply(subject(), data)
    with pytest.raises(TransformError, match=r"in training code use optkit\.engines\.DraftEngine"):
        Draft().apply(subject())
    with pytest.raises(ProblemsError, match="model and variant are both named"):
        recipe_from_dict({"name": "x", "transforms": [{"draft": {"model": "./other", "variant": {"bits": 4}}}]})


def test_it_is_a_subject_like_any_other(subject: Any, tmp_path: Any, ids: torch.Tensor) -> None:
    from optkit.models import artefact

    data = Calibration(untouched=lambda: subject().module, open_model=lambda spec: subject().module)
    made: Subject = Draft().apply(subject(), data)
    artefact.save(made, tmp_path / "kept")
    again = artefact.load(tmp_path / "kept")
    assert type(again.module).__name__ == "Variants" and isinstance(engine_for(again), DraftEngine)
    assert tokens_of(engine_for(again), ids[:1]) == tokens_of(engine_for(made), ids[:1])
