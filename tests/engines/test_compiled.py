"""Steps as one graph of torch.compile give the logits of the model's own forward; the graph holds across steps, prompts and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from optkit.core.subject import Subject
from optkit.engines import CompiledEngine, CompiledForward, EagerEngine, NativeEngine, engine_for, told
from optkit.engines import compiled as home
from optkit.kernels.native import native
from optkit.transforms import Compile, Int8

pytestmark = pytest.mark.slow


def gpt2(_: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)).eval()


def packed_llama(subject: Callable[..., Subject]) -> nn.Module:
    return Int8().apply(subject(num_hidden_layers=2, max_position_embeddings=512).module)


@pytest.mark.parametrize("make", [gpt2, packed_llama])
def test_compiled_steps_give_the_logits_of_the_model_with_one_graph(subject: Any, make: Any) -> None:
    module = make(subject)
    fast, plain = CompiledEngine(module), EagerEngine(module)
    counters.clear()
    for prompt in (3, 5):  # few enough rows for float32 all the way
        ids = torch.randint(0, 96, (1, prompt + 6))
        torch.testing.assert_close(fast.prefill(ids[:, :prompt]), plain.prefill(ids[:, :prompt]), rtol=1e-4, atol=1e-4)
        for column in ids[:, prompt:].T:
            torch.testing.assert_close(fast.step(column), plain.step(column), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_text_beyond_the_cache_goes_on_in_a_larger_one(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_ROUND_TO", 8)
    module = packed_llama(subject)
    fast, plain = CompiledEngine(module), EagerEngine(module)
    ids = torch.randint(0, 96, (1, 16))
    fast.prefill(ids[:, :4])
    plain.prefill(ids[:, :4])
    for column in ids[:, 4:].T:
        torch.testing.assert_close(fast.step(column), plain.step(column), rtol=1e-4, atol=1e-4)


def test_a_plain_module_runs_compiled(mlp: Callable[[], nn.Module]) -> None:
    module = Int8().apply(mlp())
    engine = engine_for(Compile().apply(Subject(module, "mlp", kind="module")))
    assert isinstance(engine, CompiledForward)
    x = torch.randn(3, 64)
    torch.testing.assert_close(engine.forward({"input": x}), module(x))


def test_the_backend_is_chosen_by_the_model_and_the_reason_is_told(subject: Any) -> None:
    other = engine_for(Compile().apply(Subject(gpt2(None), "gpt2")))
    assert isinstance(other, CompiledEngine)
    assert "gpt2 is none of llama" in (told(other) or "")
    known = engine_for(Compile().apply(subject()))
    assert isinstance(known, NativeEngine if native() is not None else CompiledEngine)
    asked = engine_for(Compile(backend="inductor").apply(subject()))
    assert isinstance(asked, CompiledEngine)
