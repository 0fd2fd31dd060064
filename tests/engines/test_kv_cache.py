"""Generating from quantized keys and values: what attention sees, at every length, window and batch, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import CompiledEngine, EagerEngine, KvCacheEngine, NativeEngine, engine_for, told
from optkit.engines.eager import cache_name
from optkit.engines.held import held_bytes
from optkit.kernels.kv import dequantize, quantize
from optkit.kernels.native import native
from optkit.transforms import Compile, KvCache

Llama = Callable[..., nn.Module]
LAYERS, KV_HEADS, CHANNELS = 3, 2, 16


@pytest.fixture(params=["full", "sliding", "mixed"])
def module(request: pytest.FixtureRequest, tiny_llama: Llama) -> nn.Module:
    """Return a model whose layers see everything, a window of 8, or one and the other."""
    if request.param == "full":
        return tiny_llama()
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = tiny_llama().config.to_dict()
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    common = {name: sizes[name] for name in wanted} | {"initializer_range": 0.2, "sliding_window": 8}
    if request.param == "sliding":
        return MistralForCausalLM(MistralConfig(**common)).eval()
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Qwen2ForCausalLM(Qwen2Config(**common, use_sliding_window=True, layer_types=kinds)).eval()


def along(engine: Any, ids: Tensor, prompt: int) -> Tensor:
    """Return the logits of positions ``prompt`` - 1 and after, given one by one."""
    found = [engine.prefill(ids[:, :prompt])]
    found += [engine.step(column) for column in ids[:, prompt:].T]
    return torch.stack(found, dim=1)


def error(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


class Rounded(DynamicCache):
    """transformers' own cache, given keys and values that were rounded before."""

    def __init__(self, config: Any, bits: int, group_size: int | None) -> None:
        super().__init__(config=config)
        self.how = (bits, group_size)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        bits, _ = self.how
        keys, values = (dequantize(quantize(states, *self.how), bits, states.dtype) for states in (key_states, value_states))
        found: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return found


@pytest.mark.parametrize("keep_recent", [30, 64])
@pytest.mark.parametrize("prompt", [1, 5, 20])
def test_while_all_is_recent_nothing_differs_from_the_plain_cache(module: nn.Module, keep_recent: int, prompt: int) -> None:
    ids = torch.randint(0, 96, (2, 30))
    engine = KvCacheEngine(module, bits=4, keep_recent=keep_recent)
    assert torch.equal(along(engine, ids, prompt), along(EagerEngine(module), ids, prompt))
    with torch.inference_mode():
        assert torch.equal(engine.score(ids), module(input_ids=ids, use_cache=True).logits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_attention_sees_every_key_and_value_as_the_cache_gives_it_back(module: nn.Module, bits: int, group_size: int | None) -> None:
    ids = torch.randint(0, 96, (3, 24))
    engine = KvCacheEngine(module.double(), bits, group_size)  # in float32 another order of sums moves a number by one, now and then
    with torch.inference_mode():
        given = {cache_name(module): Rounded(module.config, bits, group_size)}
        expected = module(input_ids=ids, use_cache=True, **given).logits
        untouched = module(input_ids=ids).logits
    torch.testing.assert_close(engine.score(ids), expected, rtol=1e-4, atol=1e-4)
    for prompt in (1, 6, 13):
        torch.testing.assert_close(along(engine, ids, prompt), expected[:, prompt - 1 :], rtol=1e-4, atol=1e-4)
    assert error(expected, untouched) > 1e-3
    assert error(expected, untouched) < (0.1 if bits == 8 else 1.5)


@pytest.mark.parametrize("keep_recent", [1, 7, 9, 16])
def test_a_score_is_what_generation_gives_or_sees_a_little_less(module: nn.Module, keep_recent: int) -> None:
    ids = torch.randint(0, 96, (2, 30))
    engine = KvCacheEngine(module.double(), bits=4, keep_recent=keep_recent)
    one_by_one, scored = along(engine, ids, 1), engine.score(ids)
    if keep_recent < 16:  # pieces of one position
        torch.testing.assert_close(scored, one_by_one, rtol=1e-4, atol=1e-4)
    else:
        assert (scored - one_by_one).norm() < (KvCacheEngine(module, bits=4).score(ids) - one_by_one).norm()


def test_eight_bits_nearly_always_choose_the_same_tokens(tiny_llama: Llama) -> None:
    module = tiny_llama()
    ids = torch.randint(0, 96, (8, 48))
    with torch.inference_mode():
        best = module(input_ids=ids).logits.argmax(-1)
    agreed = {bits: float((KvCacheEngine(module, bits).score(ids).argmax(-1) == best).double().mean()) for bits in (8, 4)}
    assert agreed[8] > 0.97
    assert agreed[4] < agreed[8]


def test_what_is_kept_is_packed_and_grows_by_one_position_a_step(tiny_llama: Llama) -> None:
    for bits, group_size, keep_recent in ((8, None, 0), (4, 8, 0), (4, None, 5)):
        engine = KvCacheEngine(tiny_llama(), bits, group_size, keep_recent)
        assert engine.cache_bytes() == 0
        ids = torch.randint(0, 96, (2, 11))
        engine.prefill(ids)
        groups = CHANNELS // (group_size or CHANNELS)
        one = 2 * LAYERS * 2 * KV_HEADS * (CHANNELS * bits // 8 + groups * 2 * 2)  # keys and values of 2 sequences; 2 numbers of 2 bytes
        recent = 2 * LAYERS * 2 * KV_HEADS * CHANNELS * 4 * keep_recent
        assert engine.cache_bytes() == one * (11 - keep_recent) + recent
        for count in range(1, 4):
            engine.step(ids[:, 0])
            assert engine.cache_bytes() == one * (11 + count - keep_recent) + recent
        engine.score(ids[:1])
        assert engine.cache_bytes() == one * (14 - keep_recent) + recent, "a score leaves the request as it is"
        engine.reset()
        assert engine.cache_bytes() == 0


@pytest.mark.parametrize("keep_recent", [0, 3, 20])
def test_beyond_a_window_nothing_is_kept(keep_recent: int) -> None:
    from optkit.engines.kv_cache import KvLayer

    layer, plain = KvLayer(8, None, keep_recent, window=8), KvLayer(8, None, keep_recent)
    for count in (13, 1, 1, 4):
        sizes = layer.get_mask_sizes(count)
        keys, values = torch.randn(2, 1, 1, count, 16)
        seen, _ = layer.update(keys, values)
        every, _ = plain.update(keys, values)
        assert seen.shape[-2] == sizes[0]
        assert layer.get_seq_length() == plain.get_seq_length() == every.shape[-2] == sum(sizes)
        if keep_recent == 0:
            assert torch.equal(seen, every[:, :, sizes[1] :])
        packed = 0 if layer.packed_keys is None else layer.packed_keys.positions
        assert packed + layer.keys.shape[-2] == 7
        assert layer.keys.shape[-2] == min(keep_recent, 7)
        assert held_bytes(layer) == 2 * (packed * (16 + 4) + layer.keys.shape[-2] * 16 * 4)


def test_bytes_of_shared_memory_count_once_and_marks_not_at_all() -> None:
    large = torch.zeros(2, 3, 4)
    assert held_bytes({"a": [large, large[:, 1:]], "b": (torch.zeros(3), None, "text", 7)}) == 24 * 4
    assert held_bytes(None) == 0


def test_every_engine_scores_like_the_model_and_counts_its_cache(tiny_llama: Llama, ids: Tensor, logits: Any) -> None:
    module = tiny_llama(max_position_embeddings=512)
    engines: list[Any] = [EagerEngine(module), CompiledEngine(module), *([NativeEngine(module)] if native() is not None else [])]
    for engine in engines:
        assert torch.equal(engine.score(ids), logits(module))
        assert engine.cache_bytes() == 0
        engine.prefill(ids)
        positions = ids.shape[1] if type(engine) is EagerEngine else 256
        assert engine.cache_bytes() == 2 * LAYERS * len(ids) * KV_HEADS * positions * CHANNELS * 4
        engine.reset()
        assert engine.cache_bytes() == 0


def test_a_history_with_kv_cache_chooses_the_engine_and_both_say_so(subject: Callable[..., Subject]) -> None:
    engine = engine_for(KvCache(bits=4, group_size=8, keep_recent=6).apply(subject()))
    assert isinstance(engine, KvCacheEngine)
    assert (engine.bits, engine.group_size, engine.keep_recent) == (4, 8, 6)
    assert "kept in 4 bits, the 6 most recent positions as they are" in (told(engine) or "")
    with pytest.raises(TransformError, match="leave out compile or kv_cache"):
        engine_for(Compile(backend="inductor").apply(KvCache().apply(subject())))


def test_a_model_that_keeps_its_past_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_llama: Llama) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(TransformError, match=r"layer 0 of mamba keeps its past as LinearAttentionLayer.*leave kv_cache out"):
        KvCacheEngine(mamba)
    module = tiny_llama()
    engine = KvCacheEngine(module)
    plain = module.forward
    monkeypatch.setattr(module, "forward", lambda cache=None, past_key_values=None, **inputs: plain(**inputs))
    for call in (engine.prefill, engine.score):
        with pytest.raises(TransformError, match="keeps the past of layer 0 elsewhere"):
            call(torch.zeros(1, 3, dtype=torch.long))


def test_beams_are_refused(tiny_llama: Llama) -> None:
    engine = KvCacheEngine(tiny_llama())
    engine.prefill(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(TransformError, match="generate greedily"):
        engine.cache.reorder_cache(torch.tensor([0]))
    engine.cache.reset()
    assert engine.cache_bytes() == 0
