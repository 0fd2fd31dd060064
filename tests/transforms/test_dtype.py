"""Casting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.subject import Subject
from optkit.transforms import Dtype, Int4, Int8, Transform

Subjects = Callable[..., Subject]
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_parameters_are_cast_and_the_configuration_says_so(subject: Subjects, name: str) -> None:
    module = Dtype(dtype=name).apply(subject()).module  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in module.parameters()} == {KINDS[name]}
    assert module.config.dtype == KINDS[name]


def test_rotary_frequencies_keep_their_precision(subject: Subjects, tmp_path: Path) -> None:
    before = subject().module.model.rotary_emb.inv_freq.clone()  # type: ignore[operator,union-attr]
    half = Dtype(dtype="bfloat16").apply(subject())
    optkit.save(half, tmp_path / "half")
    for module in (half.module, optkit.load(tmp_path / "half").module):
        frequencies = module.model.rotary_emb.inv_freq  # type: ignore[union-attr]
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, before)  # type: ignore[arg-type]


def test_saved_buffers_are_cast_and_counters_are_not() -> None:
    module = Dtype(dtype="bfloat16").apply(nn.BatchNorm1d(4))
    assert module.running_mean.dtype == torch.bfloat16
    assert module.num_batches_tracked.dtype == torch.int64


def test_tied_weights_stay_tied(subject: Subjects) -> None:
    module = Dtype(dtype="bfloat16").apply(subject()).module
    assert module.lm_head.weight is module.model.embed_tokens.weight  # type: ignore[union-attr]


def test_casting_up_again_costs_only_the_rounding(subject: Subjects, logits: Callable[[nn.Module], Tensor]) -> None:
    whole = subject()
    rounded = {name: tensor.bfloat16().float() for name, tensor in whole.module.state_dict().items()}
    back = Dtype(dtype="float32").apply(Dtype(dtype="bfloat16").apply(whole)).module
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in back.state_dict().items())
    assert logits(back).dtype == torch.float32


@pytest.mark.parametrize("packing", [Int8(), Int4()], ids=["int8", "int4"])
def test_packed_layers_keep_their_integers_and_compute_in_the_new_type(
    subject: Subjects, logits: Callable[[nn.Module], Tensor], packing: Transform, tmp_path: Path
) -> None:
    packed = packing.apply(subject(attention_bias=True))
    before = {name: tensor.clone() for name, tensor in packed.module.state_dict().items() if "weight" in name and "norm" not in name}
    half = Dtype(dtype="bfloat16").apply(packed)
    after = half.module.state_dict()
    assert before
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert logits(half.module).dtype == torch.bfloat16
    optkit.save(half, tmp_path / "half")
    assert torch.equal(logits(optkit.load(tmp_path / "half").module), logits(half.module))
