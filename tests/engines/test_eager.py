"""The model's own forward, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optkit.core.subject import Subject
from optkit.engines import EagerEngine, EagerForward, engine_for

Subjects = Callable[..., Subject]


def test_the_kind_of_a_subject_chooses_its_engine(subject: Subjects, mlp: Callable[[], nn.Module]) -> None:
    assert isinstance(engine_for(subject()), EagerEngine)
    assert isinstance(engine_for(Subject(mlp(), "mlp", kind="module")), EagerForward)


def test_prefill_and_steps_give_the_logits_of_full_forwards(subject: Subjects, ids: Tensor, logits: Callable[[nn.Module], Tensor]) -> None:
    whole = subject()
    engine, expected = EagerEngine(whole.module), logits(whole.module)
    torch.testing.assert_close(engine.prefill(ids[:, :5]), expected[:, 4], rtol=1e-4, atol=1e-4)
    for position in range(5, 12):
        torch.testing.assert_close(engine.step(ids[:, position]), expected[:, position], rtol=1e-4, atol=1e-4)


def test_a_prefill_forgets_what_was_before(subject: Subjects, ids: Tensor) -> None:
    engine = EagerEngine(subject().module)
    first = engine.prefill(ids)
    engine.step(ids[:, 0])
    assert torch.equal(engine.prefill(ids), first)
    engine.reset()
    assert torch.equal(engine.prefill(ids), first)


def test_a_dropout_layer_is_still_while_it_is_measured() -> None:
    engine = EagerForward(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train())
    x = torch.randn(3, 4)
    assert torch.equal(engine.forward({"input": x}), engine.forward({"input": x}))
