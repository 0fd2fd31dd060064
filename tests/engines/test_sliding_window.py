"""A cache of the first and last positions: what each position sees, how little is kept, and the same tokens by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import EagerEngine, NativeEngine, SlidingWindowEngine, engine_for, sliding_window, told
from optkit.kernels.native import native
from optkit.transforms import Compile, KvCache, Plan, PrefixCache, SlidingWindow, StaticCache

COUNT = 40
needs_kernels = pytest.mark.skipif(native() is None, reason="there are no kernels here")


def tokens_of(engine: Any, ids: Tensor, count: int = COUNT) -> Tensor:
    first = engine.first(ids)
    return torch.stack([first, *engine.further(first, count - 1)], 1)


def ids_of(rows: int, length: int = 24) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def by_mask(module: Any, ids: Tensor, positions: int, sinks: int) -> Tensor:
    """Return the logits of one forward over the whole text, in which each position sees what it should."""
    mine, theirs = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None, :]
    seen = (theirs <= mine) & ((theirs < sinks) | (theirs > mine - positions))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.inference_mode():
        logits: Tensor = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@pytest.mark.parametrize("piece", [1, 9, 512])
@pytest.mark.parametrize(("positions", "sinks"), [(1, 0), (5, 0), (7, 2), (16, 4), (23, 1), (200, 4)])
def test_each_position_sees_the_first_and_the_last_ones_in_prompts_steps_and_judgement(
    tiny_llama: Any, positions: int, sinks: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliding_window, "_PIECE", piece)
    module, ids = tiny_llama(), ids_of(2)
    engine = SlidingWindowEngine(module, positions, sinks)
    text = torch.cat((ids, tokens_of(engine, ids)), 1)
    whole = by_mask(module, text, positions, sinks)
    assert torch.equal(whole[:, ids.shape[1] - 1 : -1].argmax(-1), text[:, ids.shape[1] :])
    assert torch.allclose(engine.score(text), whole, atol=1e-5)


def test_a_window_beyond_the_text_changes_nothing_and_a_short_one_does(tiny_llama: Any) -> None:
    module, ids = tiny_llama(), ids_of(1)
    plain = tokens_of(EagerEngine(module), ids)
    assert torch.equal(tokens_of(SlidingWindowEngine(module, 100), ids), plain)
    assert not torch.allclose(SlidingWindowEngine(module, 3, 0).score(ids), EagerEngine(module).score(ids), atol=1e-3)


@pytest.mark.parametrize("length", [8, 64, 300])
def test_what_is_kept_does_not_grow_with_the_text(tiny_llama: Any, length: int) -> None:
    engine = SlidingWindowEngine(tiny_llama(), 6, 2)
    tokens_of(engine, ids_of(1, length), 5)
    config = engine.module.config
    assert engine.cache_bytes() == 2 * 4 * 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


@needs_kernels
@pytest.mark.parametrize(("positions", "sinks"), [(1, 1), (6, 0), (9, 3), (500, 4)])
def test_the_native_step_gives_the_same_tokens_beyond_its_first_room(tiny_llama: Any, positions: int, sinks: int) -> None:
    module, ids = tiny_llama(), ids_of(2)
    native_step = NativeEngine(module, sliding={"positions": positions, "sinks": sinks})
    count = 260  # rotations are made anew for positions beyond 256
    assert torch.equal(tokens_of(native_step, ids, count), tokens_of(SlidingWindowEngine(module, positions, sinks), ids, count))
    assert torch.equal(tokens_of(native_step, ids_of(1)), tokens_of(SlidingWindowEngine(module, positions, sinks), ids_of(1)))


@needs_kernels
def test_a_recipe_chooses_the_engine_and_tells_what_is_kept(subject: Callable[..., Subject]) -> None:
    cut = SlidingWindow(positions=5, sinks=2).apply(subject())
    for found, kind in ((cut, SlidingWindowEngine), (Compile().apply(cut), NativeEngine)):
        engine = engine_for(found)
        assert isinstance(engine, kind)
        assert "keys and values of the last 5 positions and the first 2" in str(told(engine))


def test_learned_positions_go_on_where_the_text_goes_on() -> None:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_head=2, n_layer=2, n_positions=128, attn_implementation="eager")).eval()
    ids = ids_of(2)
    engine = SlidingWindowEngine(module, 6, 2)
    text = torch.cat((ids, tokens_of(engine, ids)), 1)
    whole = by_mask(module, text, 6, 2)
    assert torch.equal(whole[:, ids.shape[1] - 1 : -1].argmax(-1), text[:, ids.shape[1] :])


def test_models_that_count_positions_by_their_mask_are_refused() -> None:
    module = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(TransformError, match=r"counts its positions by the mask.*leave sliding_window out"):
        SlidingWindow().check(Plan(Subject(module, "bloom")))
    with pytest.raises(TransformError, match="counts its positions by the mask"):
        SlidingWindowEngine(module, 4)


@pytest.mark.parametrize(
    ("first", "second", "told_"),
    [
        (SlidingWindow(), SlidingWindow(), "name it once"),
        (SlidingWindow(), KvCache(), "sliding_window has an engine of its own"),
        (KvCache(), SlidingWindow(), "kv_cache has an engine of its own"),
        (StaticCache(), SlidingWindow(), "static_cache has an engine of its own"),
        (SlidingWindow(), StaticCache(), "sliding_window has an engine of its own"),
        (PrefixCache(), SlidingWindow(), "prefix_cache has an engine of its own"),
        (SlidingWindow(), PrefixCache(), "sliding_window has an engine of its own"),
        (PrefixCache(), KvCache(), "prefix_cache has an engine of its own"),
        (Compile(backend="inductor"), SlidingWindow(), "graphs of torch.compile keep all positions"),
        (SlidingWindow(), Compile(backend="inductor"), "leave out compile or sliding_window"),
        (StaticCache(), Compile(), "leave out static_cache"),
        (Compile(), StaticCache(), "compile has an engine of its own"),
    ],
)
def test_what_cannot_keep_a_past_together_is_refused(subject: Callable[..., Subject], first: Any, second: Any, told_: str) -> None:
    with pytest.raises(TransformError, match=told_):
        second.check(Plan(first.apply(subject())))
