"""Room taken beforehand: the same tokens, and nothing copied from token to token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import EagerEngine, StaticCacheEngine, engine_for
from optkit.transforms import Plan, StaticCache


def tokens_of(engine: Any, ids: Tensor, count: int = 30) -> Tensor:
    first = engine.first(ids)
    return torch.stack([first, *engine.further(first, count - 1)], 1)


def ids_of(rows: int, length: int = 24) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", [None, 1, 24, 30, 500])
def test_the_tokens_are_those_of_a_growing_cache_whatever_room_there_is(tiny_llama: Any, positions: int | None) -> None:
    engine, plain = StaticCacheEngine(tiny_llama(), positions), EagerEngine(tiny_llama())
    for rows in (2, 1):
        assert torch.equal(tokens_of(engine, ids_of(rows)), tokens_of(plain, ids_of(rows)))


def test_a_step_writes_into_the_room_that_is_there(tiny_llama: Any) -> None:
    engine = StaticCacheEngine(tiny_llama(), 64)
    token = engine.first(ids_of(1))
    places = [layer.keys.data_ptr() for layer in engine.cache.layers]
    for _ in engine.further(token, 39):
        assert [layer.keys.data_ptr() for layer in engine.cache.layers] == places
    assert engine.cache.layers[0].keys.shape[-2] == 63
    before = engine.cache_bytes()
    list(engine.further(token, 2))
    assert engine.cache_bytes() == 2 * before


def test_positions_that_are_taken_back_are_written_anew(tiny_llama: Any) -> None:
    engine, plain = StaticCacheEngine(tiny_llama()), EagerEngine(tiny_llama())
    for one in (engine, plain):
        one.first(ids_of(1))
        list(one.further(torch.tensor([3]), 4))
        one.rewind(25)
    assert torch.equal(engine.step(torch.tensor([7])), plain.step(torch.tensor([7])))


def test_a_recipe_chooses_the_engine_and_models_with_another_past_are_refused(subject: Callable[..., Subject]) -> None:
    assert isinstance(engine_for(StaticCache(positions=9).apply(subject())), StaticCacheEngine)
    sliding = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    with pytest.raises(TransformError, match="leave static_cache out"):
        StaticCache().check(Plan(Subject(sliding, "gemma2")))
