"""Where the time goes: shares that add up to the whole, work counted from shapes, and counters that say why they are silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from optkit.core.subject import Step, Subject
from optkit.engines import engine_for
from optkit.kernels.native import native
from optkit.measure.clock import EMBEDDING, FEED_FORWARD, FRAMEWORK, HEAD, NORMS, PROJECTIONS, SCORES, StageClock, stages_of
from optkit.measure.contract import Opened
from optkit.measure.counters import Counters, energy_joules, ticks_per_second
from optkit.measure.stages import SAMPLING, profile
from optkit.measure.sweep import load_of, sweep
from optkit.measure.work import Forward, work_of
from optkit.tasks.language_modeling import LanguageModeling
from optkit.transforms import Int8

Subjects = Callable[..., Subject]


class Prompts(LanguageModeling):
    """Random ids, so that no text is read."""

    def prompts(self, subject: Subject, count: int, length: int) -> torch.Tensor:
        return torch.randint(0, 96, (count, length))


def test_every_part_of_a_decoder_has_its_stage(tiny_llama: Any) -> None:
    found = stages_of(tiny_llama())
    assert found["model.embed_tokens"] == EMBEDDING and found["lm_head"] == HEAD and found["model.norm"] == NORMS
    block = "model.layers.1."
    assert found[f"{block}self_attn"] == SCORES and found[f"{block}self_attn.q_proj"] == PROJECTIONS
    assert found[f"{block}mlp"] == found[f"{block}mlp.down_proj"] == FEED_FORWARD and found[f"{block}input_layernorm"] == NORMS


def test_the_shares_of_a_forward_add_up_to_all_of_it(tiny_llama: Any) -> None:
    module = tiny_llama()
    clock = StageClock(module)
    ids = torch.randint(0, 96, (1, 16))
    with torch.inference_mode(), clock.running():
        module(input_ids=ids)
    stages = clock.by_stage()
    assert {EMBEDDING, PROJECTIONS, SCORES, FEED_FORWARD, NORMS, HEAD, FRAMEWORK} == set(stages)
    assert min(stages.values()) > 0
    assert {block for stage, block in clock.seconds if stage == FEED_FORWARD} == {0, 1, 2}
    assert not any("forward" in vars(layer) for layer in module.modules())


def test_work_is_counted_from_shapes(tiny_llama: Any) -> None:
    module = tiny_llama()
    work = work_of(module, Forward(batch=2, tokens=5, past=3))
    width, kv, ffn, blocks, rows = 64, 32, 128, 3, 10
    assert work[PROJECTIONS].flops == 2 * rows * blocks * (2 * width * width + 2 * width * kv)
    assert work[FEED_FORWARD].flops == 2 * rows * blocks * 3 * width * ffn and work[FEED_FORWARD].bytes == 4 * blocks * 3 * width * ffn
    assert work[HEAD].flops == 2 * 2 * width * 96
    assert work[SCORES].flops == blocks * 2 * width * (5 * 3 + 15) * 4
    assert work[EMBEDDING].bytes == rows * width * 4
    packed = work_of(Int8().apply(Subject(module, "own")).module, Forward(2, 5, 3))
    assert packed[FEED_FORWARD].flops == work[FEED_FORWARD].flops and packed[FEED_FORWARD].bytes < 0.3 * work[FEED_FORWARD].bytes
    assert load_of(module, Forward(2, 5, 3)).rows == rows


def test_the_encoder_works_once_a_request_and_the_decoder_once_a_token() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4)
    module = T5ForConditionalGeneration(config)
    first, later = work_of(module, Forward(2, 7)), work_of(module, Forward(2, 1, past=9))
    square, wide, source, answer = 2 * 16 * 16, 2 * 2 * 16 * 24, 2 * 7, 2
    assert later[PROJECTIONS].flops == answer * 3 * (4 + 2) * square  # of a decoder's block: four of its own, two towards the encoder
    assert first[PROJECTIONS].flops == later[PROJECTIONS].flops + source * (2 * 4 + 3 * 2) * square
    assert later[FEED_FORWARD].flops == answer * 3 * wide and first[FEED_FORWARD].flops == (source * 2 + answer * 3) * wide
    assert sum(part.calls for part in later.values()) < sum(part.calls for part in first.values())


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(native() is None, reason="there are no kernels here"))]
)
def test_a_profile_names_the_stages_of_first_and_later_tokens(subject: Subjects, compiled: bool) -> None:
    made = subject()
    if compiled:
        made = Subject(made.module, "own", history=(Step("compile", {"backend": "native"}, "real", "transformers"),))
    found = profile(Opened(made, engine_for(made), Prompts()), prompt_tokens=12, new_tokens=8, batch_size=1, rounds=3)
    assert set(found.phases) == {"prefill", "decode"}
    for phase in found.phases.values():
        assert {EMBEDDING, PROJECTIONS, SCORES, FEED_FORWARD, NORMS, HEAD, SAMPLING, FRAMEWORK} == set(phase.stages)
        assert phase.sum_ms == pytest.approx(sum(stage.ms for stage in phase.stages.values()))
    assert found.phases["decode"].stages[FEED_FORWARD].bytes > 0 and found.read_bytes_per_second > 0
    assert len(found.phases["prefill"].stages[FEED_FORWARD].blocks_ms) == 3
    assert all(reason for reason in found.unavailable.values())


def test_ticks_run_as_fast_as_a_processor(tiny_llama: Any) -> None:
    rate = ticks_per_second()
    assert rate is None or 1e8 < rate < 1e11
    assert (rate is None) == (native() is None)


def test_counters_count_or_say_why_not() -> None:
    counters = Counters()
    if counters.unavailable is None:
        with counters.counting():
            sum(range(100_000))
        assert counters.values["instructions"] > 100_000
    else:
        assert len(counters.unavailable.split()) > 4
    counters.close()
    joules, reason = energy_joules()
    assert (joules is None) == (reason is not None)


def test_a_sweep_measures_both_phases_and_leaves_out_what_takes_too_long(subject: Subjects) -> None:
    made = subject()
    found = sweep("tiny", made.module, engine_for(made), [4, 16], [1, 2], most_s=10.0)
    assert {(p.prompt, p.batch, p.phase) for p in found.points} == {
        (p, b, w) for p in (4, 16) for b in (1, 2) for w in ("prefill", "decode")
    }
    assert all(point.seconds > 0 and point.parameters > 1000 for point in found.points) and not found.skipped
    assert sweep("tiny", made.module, engine_for(made), [4, 16], [1, 2], most_s=1e-9).skipped
