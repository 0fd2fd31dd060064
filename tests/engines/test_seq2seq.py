"""Encoder and decoder: greedy tokens as transformers' own generation gives them, for several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Step, Subject
from optkit.engines import Seq2SeqEngine, engine_for
from optkit.models.architectures import kind_of


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {
        f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=60, d_model=32, max_position_embeddings=40, **layers, forced_eos_token_id=None)
    )


@pytest.fixture(params=[t5, bart], ids=["t5", "bart"])
def module(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    made: Any = request.param().eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # so that tokens differ
    return made


def request_of(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (rows, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_tokens_are_those_of_the_models_own_generation(module: Any) -> None:
    assert kind_of(module) == "seq2seq-lm"
    request, engine = request_of(), Seq2SeqEngine(module)
    found = [engine.first(request)]
    found += engine.further(found[0], 7)
    module.generation_config.eos_token_id = None
    wanted = module.generate(**request, max_new_tokens=8, do_sample=False, num_beams=1)
    assert torch.equal(torch.stack(found, 1), wanted[:, 1:9])


def test_steps_with_a_cache_answer_as_one_forward_over_the_answer(module: Any) -> None:
    request, engine = request_of(), Seq2SeqEngine(module)
    first = engine.prefill(request)
    second = engine.step(first.argmax(-1))
    labels = torch.stack([first.argmax(-1), second.argmax(-1)], 1)
    whole = engine.forward({**request, "labels": labels}).logits
    assert torch.allclose(whole[:, 0], first, atol=1e-4) and torch.allclose(whole[:, 1], second, atol=1e-4)


def test_the_cache_counts_what_the_decoder_reads_of_the_encoder_too(module: Any) -> None:
    request, engine = request_of(), Seq2SeqEngine(module)
    engine.prefill(request)
    width = 4 * 8 if hasattr(module.config, "d_kv") else 32
    own, read = 1, request["input_ids"].shape[1]
    assert engine.cache_bytes() == 2 * 2 * 3 * (own + read) * width * 4
    engine.reset()
    assert engine.cache_bytes() == 0


def test_no_compiled_engine_is_claimed_for_it(module: Any) -> None:
    step = Step("compile", {"backend": "auto"}, "real", "transformers")
    with pytest.raises(TransformError, match="leave out compile"):
        engine_for(Subject(module, "own", kind="seq2seq-lm", history=(step,)))
