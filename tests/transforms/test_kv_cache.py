"""What kv_cache accepts and refuses, on shapes alone; and that the quality figures are those of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines import EagerEngine, engine_for
from optkit.tasks.language_modeling import LanguageModeling, TextFiles
from optkit.transforms import Compile, Int4, KvCache, Plan, Transform

Subjects = Callable[..., Subject]


def check(transform: Transform, build: Callable[[], Subject]) -> None:
    with torch.device("meta"):
        transform.check(Plan(build()))


@pytest.mark.parametrize("settings", [{"bits": 6}, {"group_size": 1}, {"keep_recent": -1}, {"group_size": True}, {"bit": 8}])
def test_settings_outside_the_table_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KvCache(**settings)


def test_a_head_that_does_not_fit_is_refused(subject: Subjects) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(TransformError, match="group_size 12 does not divide the 16 channels of a head; use 16, or leave it out"):
        check(KvCache(group_size=12), subject)
    odd = GPT2Config(vocab_size=32, n_embd=60, n_head=4, n_layer=2)
    with pytest.raises(TransformError, match=r"a head of 15 channels.*use bits: 8"):
        check(KvCache(bits=4), lambda: Subject(GPT2LMHeadModel(odd), "odd"))


def test_graphs_and_a_quantized_cache_refuse_each_other_in_either_order(subject: Subjects) -> None:
    graphs = Compile(backend="inductor")
    for first, second in ((graphs, KvCache()), (KvCache(), graphs)):
        with pytest.raises(TransformError, match="leave out compile or kv_cache"):
            check(second, lambda first=first: first.apply(subject()))  # type: ignore[misc]


def test_a_second_cache_and_a_model_that_does_not_generate_are_refused(subject: Subjects, mlp: Callable[[], nn.Module]) -> None:
    with pytest.raises(TransformError, match="name kv_cache once"):
        check(KvCache(bits=4), lambda: KvCache().apply(subject()))
    with pytest.raises(TransformError, match="this is none; leave it out"):
        check(KvCache(), lambda: Subject(mlp(), "mlp", kind="module"))


def test_it_follows_packed_weights_and_leaves_them(subject: Subjects) -> None:
    whole = Int4(group_size=32).apply(subject())
    cached = KvCache().apply(whole)
    assert cached.module is whole.module
    assert (cached.opens_in, cached.execution) == ("optkit", "real")
    assert torch.isfinite(engine_for(cached).prefill(torch.zeros(1, 4, dtype=torch.long))).all()  # type: ignore[union-attr]


def test_perplexity_is_that_of_the_cache_and_of_no_other_step(subject: Subjects, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = ["def", "return", "x", "y", "z", "(", ")", ":", "=", "+", "for", "in", "0", "1"]
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(" ".join(draw.choice(words, size=60)))
    task = LanguageModeling(corpus=TextFiles(files=(str(tmp_path / "*.txt"),)), window=24)

    def nats(one: Subject, engine: Any) -> Any:
        return task.evaluate(one, engine, Group(), None, None)["nats"]

    plain = nats(subject(), EagerEngine(subject().module))
    moved = {}
    for bits, keep_recent in ((8, 0), (4, 0), (4, 24)):
        cached = KvCache(bits=bits, keep_recent=keep_recent).apply(subject())
        moved[bits, keep_recent] = float(np.abs(nats(cached, engine_for(cached)) - plain).max())
    assert 0 < moved[8, 0] < moved[4, 0]
    assert moved[4, 24] < 1e-3  # the mask is another, so the sums are
