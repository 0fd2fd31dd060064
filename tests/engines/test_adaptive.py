"""Requests get the way that the table says, and every way answers as its own engine does."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.engines import AdaptiveEngine, EagerEngine, NativeEngine, engine_for, told
from optkit.engines.adaptive import Times, Way
from optkit.engines.eager import cache_name
from optkit.kernels.native import native
from optkit.models import artefact
from optkit.transforms import Adaptive, Compile, Int4, Int8


def request(engine: Any, ids: torch.Tensor, count: int = 6) -> list[list[int]]:
    first = engine.first(ids)
    return [first.tolist(), *(token.tolist() for token in engine.further(first, count))]


@pytest.fixture
def two(tiny_llama: Any) -> tuple[AdaptiveEngine, dict[str, Any]]:
    """Return an engine of two models, the first quicker for few and the second for many, and both models."""
    modules = {"few": tiny_llama(), "many": tiny_llama(seed=5)}
    ways = {"few": Way(EagerEngine(modules["few"])), "many": Way(EagerEngine(modules["many"]), threads=1, perplexity=1.01)}
    engine = AdaptiveEngine(ways, 96, (1, 8), (8,), new_tokens=10)
    assert {size: set(times) for size, times in engine.table.items()} == {(1, 8): {"few", "many"}, (8, 8): {"few", "many"}}
    assert all(times.first_s > 0 and times.later_s > 0 for row in engine.table.values() for times in row.values())
    engine.table = {(1, 8): {"few": Times(1, 1), "many": Times(2, 1)}, (8, 8): {"few": Times(1, 1), "many": Times(2, 0.5)}}
    return engine, modules


def test_few_and_many_sequences_get_their_ways(two: tuple[AdaptiveEngine, dict[str, Any]], ids: torch.Tensor) -> None:
    engine, modules = two
    assert request(engine, ids[:1]) == request(EagerEngine(modules["few"]), ids[:1])
    many = ids.repeat(3, 1)
    assert request(engine, many) == request(EagerEngine(modules["many"]), many)
    assert {str(choice): count for choice, count in engine.chosen.items()} == {"few": 1, "many": 1}
    engine.prefill(ids[:1])
    torch.testing.assert_close(engine.step(ids[0, :1]), _step(modules["few"], ids))
    assert engine.cache_bytes() > 0
    engine.reset()
    assert engine.cache_bytes() == 0


def _step(module: Any, ids: torch.Tensor) -> torch.Tensor:
    plain = EagerEngine(module)
    plain.prefill(ids[:1])
    return plain.step(ids[0, :1])


def test_a_long_answer_may_want_another_way_than_a_short_one(two: tuple[AdaptiveEngine, dict[str, Any]]) -> None:
    engine, _ = two
    assert str(engine.best(8, 8)) == "many"
    engine._new_tokens = 2
    assert str(engine.best(8, 8)) == "few"


def test_ways_that_want_cores_which_others_use_are_passed_over(tiny_llama: Any) -> None:
    busy = [0.0]
    ways = {"all": Way(EagerEngine(tiny_llama())), "one": Way(EagerEngine(tiny_llama(seed=5)), threads=1)}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = AdaptiveEngine(ways, 96, (1,), (8,), 10, lambda: busy[0])
    finally:
        torch.set_num_threads(before)
    engine.table = {(1, 8): {"all": Times(1, 1), "one": Times(2, 2)}}
    found = []
    for busy[0] in (0.0, 0.4, 0.6, 1.0, 5.0):
        found.append(str(engine.best(1, 8)))
    assert found == ["all", "all", "one", "one", "one"]


def test_ways_of_as_many_threads_do_not_ask_for_the_load(tiny_llama: Any) -> None:
    def never() -> float:
        raise AssertionError

    engine = AdaptiveEngine({"one": Way(EagerEngine(tiny_llama()))}, 96, (1,), (8,), 10, never)
    engine.table = {(1, 8): {"one": Times(1, 1)}}
    assert str(engine.best(1, 8)) == "one"


@pytest.mark.skipif(native() is None, reason="no kernels")
def test_one_way_computes_the_prompt_and_another_goes_on(tiny_llama: Any, ids: torch.Tensor) -> None:
    plain, packed = tiny_llama(), Int8().apply(tiny_llama())
    shorter = tiny_llama(num_hidden_layers=2)
    ways = {"plain": Way(NativeEngine(plain)), "packed": Way(NativeEngine(packed)), "shorter": Way(NativeEngine(shorter))}
    engine = AdaptiveEngine(ways, 96, (1,), (8,), new_tokens=10)
    engine.table = {(1, 8): {"plain": Times(1, 5), "packed": Times(4, 1), "shorter": Times(9, 9)}}
    logits = engine.prefill(ids)
    torch.testing.assert_close(logits, EagerEngine(plain).prefill(ids))
    assert [str(choice) for choice in engine.chosen] == ["packed after plain"]
    name = cache_name(plain)
    cached = plain(input_ids=ids, use_cache=True)[name]
    expected = packed(input_ids=ids[:, :1], use_cache=True, **{name: cached}).logits[:, -1]
    torch.testing.assert_close(engine.step(ids[:, 0]), expected, rtol=0, atol=1e-3)
    assert not ways["plain"].engine.is_like(ways["shorter"].engine) and not ways["plain"].engine.is_like(EagerEngine(plain))


def test_it_is_judged_by_its_worst_way(two: tuple[AdaptiveEngine, dict[str, Any]], ids: torch.Tensor) -> None:
    engine, modules = two
    torch.testing.assert_close(engine.score(ids), EagerEngine(modules["many"]).score(ids))


def data_of(subject: Any, ids: torch.Tensor) -> Calibration:
    return Calibration(({"input_ids": ids},), untouched=lambda: deepcopy(subject().module))


def test_ways_beyond_the_bound_are_left_out_and_what_was_measured_is_told(subject: Any, ids: torch.Tensor, tmp_path: Any) -> None:
    ways = ({"bits": 8, "compile": False}, {"drop_layers": (0, 2)}, {"threads": 1})
    made: Subject = Adaptive(ways=ways, most_perplexity=1.05, batch_sizes=(1,), prompt_tokens=(8,)).apply(subject(), data_of(subject, ids))
    settings = made.history[-1].settings
    assert [way["drop_layers"] for way in settings["ways"]] == [[], []] and len(settings["perplexities"]) == 3
    assert settings["perplexities"][0] == settings["perplexities"][2] == 1
    artefact.save(made, tmp_path / "kept")
    engine = engine_for(artefact.load(tmp_path / "kept"))
    assert isinstance(engine, AdaptiveEngine) and list(engine.ways)[1] == "8 bits"
    assert "the quickest of 3 ways" in str(told(engine))


def test_what_breaks_the_bound_or_makes_no_sense_is_refused(subject: Any, ids: torch.Tensor) -> None:
    data = data_of(subject, ids)
    with pytest.raises(TransformError, match=r"the ways have \d.*raise most_perplexity, or name others"):
        Adaptive(ways=({"drop_layers": (0, 1)},), most_perplexity=1.0001).apply(subject(), data)
    rough = Int4(group_size="channel").apply(subject())
    with pytest.raises(TransformError, match="the model as it is has"):
        Adaptive(ways=({"bits": 8},), most_perplexity=0.5).apply(rough, data)
    with pytest.raises(TransformError, match="in a recipe; in training code"):
        Adaptive(ways=({"bits": 8},)).apply(subject())
    if native() is not None:
        made = Adaptive(ways=({"bits": 8},), batch_sizes=(1,), prompt_tokens=(8,), most_perplexity=2).apply(subject(), data)
        from optkit.transforms import Plan

        with pytest.raises(TransformError, match="adaptive has chosen how its models are executed"):
            Compile().check(Plan(made))
