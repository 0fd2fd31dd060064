"""Our own step beside the model's: equal logits for every family, weight format, batch and length it claims, and a refusal for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import EagerEngine, KvCacheEngine, NativeEngine, engine_for, told
from optkit.engines import native as home
from optkit.engines.native import FAMILIES, refusal
from optkit.kernels.native import native
from optkit.transforms import Compile, Dtype, Int4, Int8, KvCache, Plan

needs_kernels = pytest.mark.skipif(native() is None, reason="the compiled kernels are not here")


@pytest.fixture(scope="module")
def build() -> Callable[..., nn.Module]:
    def make(family: str, **changes: Any) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        torch.manual_seed(0)
        module: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | changes))).eval()
        for name, parameter in module.named_parameters():  # norms are ones and biases zeros at first, which would hide a mistake
            if parameter.ndim == 1:
                nn.init.uniform_(parameter.data, 0.5, 1.5) if "norm" in name else nn.init.normal_(parameter.data)
        return module

    return make


def worst(module: nn.Module, batch: int, prompt: int, steps: int, cache: dict[str, Any] | None = None) -> float:
    """Return the largest error of the steps' logits, relative to their norm, against the model's own steps."""
    fast, plain = NativeEngine(module, cache), EagerEngine(module) if cache is None else KvCacheEngine(module, **cache)
    ids = torch.randint(0, 96, (batch, prompt + steps))
    assert torch.equal(fast.prefill(ids[:, :prompt]), plain.prefill(ids[:, :prompt]))
    found = 0.0
    for column in ids[:, prompt:].T:
        mine, other = fast.step(column).double(), plain.step(column).double()
        assert mine.shape == other.shape
        found = max(found, float(((mine - other).norm(dim=-1) / other.norm(dim=-1)).max()))
    return found


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_gives_the_logits_of_the_model(build: Any, family: str, batch: int) -> None:
    assert worst(build(family), batch, prompt=5, steps=12) < 1e-5


@needs_kernels
@pytest.mark.parametrize("change", [Int8(), Int4(group_size=32)], ids=["int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_packed_layers_run_within_the_step(build: Any, change: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    module = change.apply(build("qwen2", hidden_size=96, head_dim=32, intermediate_size=160))
    assert worst(module, 2, prompt=7, steps=6) < 5e-4  # int4 steps round x to 16 bits


@needs_kernels
def test_a_bfloat16_model_steps_in_float32(build: Any) -> None:
    assert worst(Dtype(dtype="bfloat16").apply(build("llama")), 1, prompt=4, steps=4) < 0.15


@needs_kernels
def test_the_cache_grows_with_the_text(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_ROUND_TO", 8)
    assert worst(build("llama"), 2, prompt=6, steps=30) < 1e-5


@needs_kernels
@pytest.mark.parametrize("prompt", [4, 20])
def test_a_sliding_window_is_kept(build: Any, prompt: int) -> None:
    assert worst(build("mistral", sliding_window=8), 1, prompt=prompt, steps=12) < 1e-5


@needs_kernels
@pytest.mark.parametrize("rotation", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_fixed_rotations_are_known(build: Any, rotation: dict[str, Any]) -> None:
    module = build("llama", rope_parameters={"rope_theta": 10000.0, **rotation})
    assert worst(module, 1, prompt=5, steps=5) < 1e-5


@needs_kernels
def test_one_engine_serves_one_prompt_after_another_at_any_batch(build: Any) -> None:
    module = build("llama")
    engine = NativeEngine(module)
    for batch, prompt in ((1, 9), (3, 4), (1, 2)):
        plain = EagerEngine(module)
        ids = torch.randint(0, 96, (batch, prompt))
        engine.prefill(ids)
        plain.prefill(ids)
        torch.testing.assert_close(engine.step(ids[:, 0]), plain.step(ids[:, 0]), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_an_engine_that_differs_from_the_model_refuses_to_serve(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rotation = home._rotation
    monkeypatch.setattr(home, "_rotation", lambda module, positions: tuple(part.flip(1) for part in rotation(module, positions)))
    with pytest.raises(TransformError, match="differs from the model's own"):
        NativeEngine(build("llama"))


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "gpt2 is none of llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"head_dim": 24}, "head size 24"),
        ("llama", {"hidden_size": 72}, "hidden size 72"),
    ],
)
def test_what_it_does_not_know_is_refused_with_the_reason(build: Any, family: str, changes: dict[str, Any], why: str) -> None:
    module = build(family, **changes)
    if native() is not None or family == "gpt2":
        assert why in str(refusal(module))
    with pytest.raises(TransformError, match="cannot run this model"):
        NativeEngine(module)


def test_without_kernels_it_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "native", lambda: None)
    assert refusal(build("llama")) is not None


@needs_kernels
def test_a_step_for_another_number_of_sequences_is_refused(build: Any) -> None:
    engine = NativeEngine(build("llama"))
    with pytest.raises(ValueError, match="do not fit"):
        engine.step(torch.zeros(1, dtype=torch.long))
    engine.prefill(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit 2 sequences"):
        engine.step(torch.zeros(3, dtype=torch.long))


@needs_kernels
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, None), (4, 32)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_packed_cache_gives_the_logits_of_the_packed_cache_in_python(build: Any, family: str, bits: int, group_size: int | None) -> None:
    changes = {"head_dim": 64, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "initializer_range": 0.05}
    window = {"sliding_window": 8} if family == "mistral" else {}
    cache = {"bits": bits, "group_size": group_size, "keep_recent": 0}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert worst(build(family, **changes, **window), 2, prompt=5, steps=12, cache=cache) < (
                5e-3 if bits == 8 else 0.2
            )  # a number may fall to the other side
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_what_the_step_keeps_is_what_python_would_keep(build: Any, bits: int) -> None:
    module = build("llama", head_dim=32)
    cache = {"bits": bits, "group_size": None, "keep_recent": 0}
    fast, plain = NativeEngine(module, cache), KvCacheEngine(module, **cache)
    ids = torch.randint(0, 96, (2, 9))
    for engine in (fast, plain):
        engine.prefill(ids[:, :4])
        for column in ids[:, 4:].T:
            engine.step(column)
    assert fast._decoder is not None
    mine, other = fast._decoder.keys[0], plain.cache.layers[0].packed_keys
    equal = (mine[0][:, :, :9] == other[0]).double().mean()
    assert equal > 0.99  # one in a thousand may fall to the other side
    for ours, theirs in zip(mine[1:], other[1:], strict=True):
        torch.testing.assert_close(ours[:, :, :9].float(), theirs.float(), rtol=2**-7, atol=1e-6)
    assert fast.cache_bytes() == 2 * 3 * 2 * 2 * 256 * (32 * bits // 8 + 4)


@needs_kernels
def test_a_packed_cache_grows(build: Any) -> None:
    assert worst(build("llama", head_dim=32), 1, prompt=250, steps=12, cache={"bits": 8, "group_size": None, "keep_recent": 0}) < 2e-3


@needs_kernels
def test_a_compiled_step_keeps_a_quantized_cache_where_it_can(build: Any) -> None:
    subject = Subject(build("llama", head_dim=32), "llama")
    for first, second in ((Compile(), KvCache(bits=4)), (KvCache(bits=4), Compile())):
        second.check(Plan(first.apply(subject)))
        engine = engine_for(second.apply(first.apply(subject)))
        assert isinstance(engine, NativeEngine) and "in 4 bits" in (told(engine) or "")
    assert refusal(subject.module, {"bits": 4, "group_size": 16, "keep_recent": 0}) == "groups of 16 channels, no multiple of 32"
    with pytest.raises(TransformError, match="keep_recent 4"):
        KvCache(keep_recent=4).check(Plan(Compile().apply(subject)))
    with pytest.raises(TransformError, match=r"graphs of torch\.compile keep floats"):
        KvCache().check(Plan(Compile(backend="inductor").apply(subject)))


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_integer_activations_run_within_the_step(build: Any, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 3, 14):
            assert worst(Int8(activations="dynamic").apply(build("qwen2", hidden_size=80)), batch, prompt=5, steps=6) < 2e-2
    finally:
        torch.set_num_threads(before)
