"""Without their padding, items give what they give with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import BucketedForward, EagerForward, engine_for, told
from optkit.models.networks import NETWORKS
from optkit.transforms import Bucketing, Plan

LENGTHS = (3, 16, 17, 1, 40, 9)


def encoder(per: str = "item") -> nn.Module:
    torch.manual_seed(0)
    needs = {"per": per, "vocabulary": 50, "labels": ["a", "b", "c"], "positions": 40}
    return NETWORKS["encoder"](layers=2, hidden_size=32, heads=2).build(needs).eval()


def batch() -> dict[str, Tensor]:
    mask = (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(2, 50, (len(LENGTHS), 40)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_items_are_answered_as_in_the_whole_batch(multiple: int) -> None:
    module, inputs = encoder(), batch()
    engine = BucketedForward(EagerForward(module), multiple)
    torch.testing.assert_close(engine.forward(inputs).logits, EagerForward(module).forward(inputs).logits, rtol=0, atol=1e-5)
    assert engine.computed == {1: sum(LENGTHS), 16: 16 * 4 + 32 + 40, 64: 40 * len(LENGTHS)}[multiple]


def test_words_are_answered_in_their_places_and_padding_is_zero() -> None:
    module, inputs = encoder("token"), batch()
    found = BucketedForward(EagerForward(module), 8).forward(inputs).logits
    expected = EagerForward(module).forward(inputs).logits
    there = inputs["attention_mask"].bool()
    assert found.shape == expected.shape
    torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)
    assert found[0, 10:].abs().max() == 0


def test_one_number_a_position_is_the_lowest_where_there_is_padding() -> None:
    class Scores:
        def forward(self, inputs: Mapping[str, Tensor]) -> Any:
            return {"start": inputs["input_ids"].float(), "name": "kept"}

    found = BucketedForward(Scores(), 8).forward(batch())
    assert found["name"] == "kept" and found["start"].argmax(1).lt(torch.tensor(LENGTHS)).all()
    assert found["start"][0, 8:].eq(torch.finfo(torch.float32).min).all()


def test_models_whose_answers_would_change_are_refused(tiny_llama: Any) -> None:
    needs = {"per": "item", "vocabulary": 50, "labels": ["a", "b"], "positions": 40}
    recurrent = Subject(NETWORKS["bilstm"](embedding_size=8, hidden_size=8).build(needs), "own", kind="module")
    with pytest.raises(TransformError, match="recurrent layers run over the padding"):
        Bucketing().check(Plan(recurrent))
    with pytest.raises(TransformError, match="takes no attention_mask"):
        Bucketing().check(Plan(Subject(nn.Linear(2, 2), "own", kind="module")))
    with pytest.raises(TransformError, match="this one generates"):
        Bucketing().check(Plan(Subject(tiny_llama(), "own")))
    twice = Bucketing().apply(Subject(encoder(), "own", kind="module"))
    assert "multiple of 16" in str(told(engine_for(twice)))
    with pytest.raises(TransformError, match="name it once"):
        Bucketing().check(Plan(twice))
