"""What can be shared layer by layer, and what is refused with its numbers before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Calibration, Subject
from optkit.engines import engine_for
from optkit.transforms import Compile, Int4, Int8, KvCache, Nf4, PipelineParallel, Plan, TensorParallel

Subjects = Callable[..., Subject]


def outline(subject: Subject) -> Subject:
    from dataclasses import replace

    from optkit.engines.parallel.cut import hollow

    return replace(subject, module=hollow(subject.module))


def test_the_subject_is_placed_and_its_module_is_the_same(subject: Subjects) -> None:
    whole = subject()
    placed = PipelineParallel(size=3, stages=(1, 1, 1)).apply(TensorParallel(size=2).apply(whole))
    assert placed.mesh == Mesh(tensor=2, pipeline=3)
    assert placed.module is whole.module
    assert [step.name for step in placed.history] == ["tensor_parallel", "pipeline_parallel"]


def test_heads_that_do_not_divide_are_refused_with_sizes_that_do(tiny_llama: Callable[..., nn.Module]) -> None:
    module = tiny_llama(num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(TransformError, match="4 heads cannot be shared evenly by 3 processes; use size 2 or 4"):
        TensorParallel(size=3).check(Plan(Subject(module, source="x")))
    with pytest.raises(TransformError, match="2 groups of heads cannot be shared evenly by 4 processes; use size 2"):
        TensorParallel(size=4).check(Plan(Subject(tiny_llama(), source="x")))
    with pytest.raises(TransformError, match="1 groups of heads cannot be shared evenly by 2 processes; there is only one"):
        TensorParallel(size=2).check(Plan(Subject(tiny_llama(num_key_value_heads=1), source="x")))


def test_widths_that_do_not_divide_name_the_layer(tiny_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(TransformError, match=r"the 129 outputs of model\.layers\.0\.mlp\.gate_proj cannot be shared evenly by 2"):
        TensorParallel(size=2).check(Plan(Subject(tiny_llama(intermediate_size=129), source="x")))


def test_groups_of_packed_weights_are_kept_whole(subject: Subjects) -> None:
    packed = Int4(group_size=64).apply(subject())
    with pytest.raises(TransformError, match=r"o_proj: column 32 is in the midst of a group of 64, .* use a smaller group_size"):
        TensorParallel(size=2).check(Plan(packed))
    TensorParallel(size=2).check(Plan(Int4(group_size=32).apply(subject())))


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (Int8(activations="dynamic"), "a scale for each token is found from all of its inputs"),
        (Nf4(), "cannot be shared by several processes"),
    ],
    ids=["dynamic", "nf4"],
)
def test_layers_that_cannot_be_taken_apart_are_refused_by_name(subject: Subjects, transform: Any, told: str) -> None:
    with pytest.raises(TransformError, match=rf"_proj: .*{told}"):
        TensorParallel(size=2).check(Plan(transform.apply(subject())))


def test_a_check_changes_nothing_of_the_model_that_it_looks_at(subject: Subjects) -> None:
    whole = subject()
    before = {name: tensor.shape for name, tensor in whole.module.state_dict().items()}
    TensorParallel(size=2).check(Plan(whole))
    PipelineParallel(size=2).check(Plan(whole, batch_sizes=(8,)))
    assert {name: tensor.shape for name, tensor in whole.module.state_dict().items()} == before
    assert not any(layer._forward_hooks for layer in whole.module.modules())


def test_other_models_are_sent_to_data_parallel() -> None:
    with pytest.raises(TransformError, match="tensor_parallel shares causal language models; this is a module: use data_parallel"):
        TensorParallel().check(Plan(Subject(nn.Sequential(nn.Linear(4, 4)), source="x", kind="module")))


def test_stages_refuse_compiled_steps_and_quantized_caches(subject: Subjects) -> None:
    for step, name in ((Compile(), "compile"), (KvCache(bits=8), "kv_cache")):
        with pytest.raises(TransformError, match=f"own cache; leave out {name}"):
            PipelineParallel().check(Plan(step.apply(subject()), batch_sizes=(8,)))


def test_shards_refuse_graphs_of_torch_compile(subject: Subjects) -> None:
    with pytest.raises(TransformError, match="compiled steps cannot run on shards: no graph of"):
        TensorParallel().check(Plan(Compile(backend="inductor").apply(subject())))


def test_stages_without_work_are_refused(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"2 stages would wait for one another with batches of 1; measure\.latency\.batch_sizes needs"):
        PipelineParallel().check(Plan(subject(), batch_sizes=(1,)))


def test_stages_are_balanced_by_measured_time_and_written_down(subject: Subjects) -> None:
    placed = PipelineParallel(size=2).apply(subject(), Calibration())
    counts = placed.history[-1].settings["stages"]
    assert len(counts) == 2 and sum(counts) == 3
    again = PipelineParallel(size=2, stages=tuple(counts)).apply(subject())
    assert again.history == placed.history


def test_too_many_processes_are_refused(subject: Subjects) -> None:
    placed = PipelineParallel(size=2, stages=(1, 2)).apply(subject())
    with pytest.raises(TransformError, match="2 x 64 processes are more than 64; use a smaller size"):
        TensorParallel(size=64).check(Plan(placed, batch_sizes=(64,)))


def test_a_placed_subject_still_runs_whole_in_one_process(subject: Subjects) -> None:
    placed = TensorParallel(size=2).apply(subject())
    engine: Any = engine_for(placed)
    assert engine.prefill(torch.arange(6)[None]).shape == (1, 96)
