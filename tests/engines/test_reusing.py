"""Prompts in pieces, beginnings from memory and guessed tokens: the same tokens as by the plain path, and less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optkit.core.errors import TransformError
from optkit.core.subject import Step, Subject
from optkit.engines import EagerEngine, NativeEngine, ReusingEngine, SpeculativeEngine, engine_for
from optkit.kernels.native import native
from optkit.transforms import ChunkedPrefill, KvCache, Plan, PrefixCache, PromptLookup

COUNT = 12


def tokens_of(engine: Any, ids: Tensor) -> list[list[int]]:
    first = engine.first(ids)
    return torch.stack([first, *engine.further(first, COUNT - 1)], 1).tolist()


def ids_of(rows: int, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
def test_prompts_in_pieces_give_the_same_tokens(tiny_llama: Any, chunk: int) -> None:
    ids = ids_of(2)
    assert tokens_of(ReusingEngine(tiny_llama(), chunk=chunk), ids) == tokens_of(EagerEngine(tiny_llama()), ids)


def test_a_beginning_that_was_met_before_is_not_computed_again(tiny_llama: Any) -> None:
    engine, plain = ReusingEngine(tiny_llama(), entries=2), EagerEngine(tiny_llama())
    ids = ids_of(1)
    other = torch.cat([ids[:, :20], ids_of(1, 6, seed=1)], 1)
    assert tokens_of(engine, ids) == tokens_of(plain, ids) and engine.computed == 24
    assert tokens_of(engine, other) == tokens_of(plain, other)
    assert engine.computed == 24 + 6 and engine.reused == 20
    assert tokens_of(engine, ids) == tokens_of(plain, ids) and engine.reused == 20 + 23


def test_a_beginning_that_all_rows_share_is_computed_once(tiny_llama: Any) -> None:
    ids = ids_of(3)
    ids[:, :18] = ids[0, :18]
    engine = ReusingEngine(tiny_llama(), entries=1)
    assert tokens_of(engine, ids) == tokens_of(EagerEngine(tiny_llama()), ids)
    assert engine.computed == 18 + 3 * 6 and engine.computed + engine.reused == 3 * 24


def test_what_is_kept_ends_with_the_last_entries_and_is_no_part_of_later_answers(tiny_llama: Any) -> None:
    engine = ReusingEngine(tiny_llama(), entries=1)
    first, second = ids_of(1), ids_of(1, seed=2)
    tokens_of(engine, first)
    tokens_of(engine, second)
    before = engine.computed
    tokens_of(engine, first)
    assert engine.computed == before + 24 and len(engine._known) == 1


@pytest.mark.skipif(native() is None, reason="there are no kernels here")
def test_the_native_step_takes_prompts_in_pieces_and_from_memory(tiny_llama: Any) -> None:
    module = tiny_llama()
    history = tuple(
        Step(name, settings, "real", "transformers")
        for name, settings in (
            ("chunked_prefill", {"tokens": 7}),
            ("prefix_cache", {"entries": 4, "least": 4}),
            ("compile", {"backend": "native"}),
        )
    )
    engine = engine_for(Subject(module, "own", history=history))
    assert isinstance(engine, NativeEngine)
    ids = ids_of(2)
    assert tokens_of(engine, ids) == tokens_of(engine, ids) == tokens_of(EagerEngine(tiny_llama()), ids)


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_guessed_tokens_are_those_of_the_plain_path(tiny_llama: Any, tokens: int) -> None:
    ids = ids_of(1, 6).repeat(1, 4)
    engine = SpeculativeEngine(tiny_llama(), tokens=tokens)
    assert tokens_of(engine, ids) == tokens_of(EagerEngine(tiny_llama()), ids)
    assert engine.forwards + engine.accepted == COUNT - 1 and engine.guessed >= engine.accepted


def test_a_model_that_repeats_itself_has_its_guesses_accepted(tiny_llama: Any) -> None:
    module = tiny_llama()
    for block in module.model.layers:  # without blocks the next token hangs on the last one alone, so that a text soon goes in circles
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    engine, plain = SpeculativeEngine(module, tokens=6), EagerEngine(module)
    first = engine.first(ids_of(1))
    found = [first, *engine.further(first, 60)]
    other = plain.first(ids_of(1))
    assert torch.equal(torch.stack(found), torch.stack([other, *plain.further(other, 60)]))
    assert engine.forwards < 40 and engine.accepted > 20


def test_several_sequences_go_the_plain_way(tiny_llama: Any) -> None:
    engine = SpeculativeEngine(tiny_llama())
    assert tokens_of(engine, ids_of(2)) == tokens_of(EagerEngine(tiny_llama()), ids_of(2)) and engine.forwards == 0


@pytest.mark.parametrize("make", [PrefixCache, ChunkedPrefill, PromptLookup])
def test_what_has_an_engine_of_its_own_is_refused(subject: Callable[..., Subject], make: Any) -> None:
    own = KvCache().apply(subject())
    with pytest.raises(TransformError, match="kv_cache has an engine of its own"):
        make().check(Plan(own))
    with pytest.raises(TransformError, match="name it once"):
        make().check(Plan(make().apply(subject())))
