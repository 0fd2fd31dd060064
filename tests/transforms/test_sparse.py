"""Pruned models without their zeros: smaller on disk, the same answers, and no simulation any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.kernels.sparse import SparseLinear
from optkit.transforms import Magnitude, Sparse

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("pruning", [Magnitude(sparsity=0.7), Magnitude(pattern="2:4")], ids=["share", "pattern"])
def test_the_answers_stay_the_file_shrinks_and_the_speed_is_real(
    subject: Subjects, logits: Logits, tmp_path: Path, pruning: Magnitude
) -> None:
    pruned = pruning.apply(subject())
    assert pruned.execution == "simulated"
    expected = logits(pruned.module)
    optkit.save(pruned, tmp_path / "dense")
    sparse = Sparse().apply(pruned)
    assert sparse.execution == "real"
    assert [step.execution for step in sparse.history] == ["real", "real"]
    torch.testing.assert_close(logits(sparse.module), expected, rtol=1e-4, atol=1e-4)
    optkit.save(sparse, tmp_path / "sparse")
    assert size(tmp_path / "sparse") < (0.6 if pruning.pattern is None else 0.75) * size(tmp_path / "dense")
    again = optkit.load(tmp_path / "sparse")
    assert torch.equal(logits(again.module), logits(sparse.module))
    assert again.history == sparse.history


def test_only_layers_with_enough_zeros_change(subject: Subjects) -> None:
    pruned = Magnitude(sparsity=0.5, targets=Targets(include=("*up_proj",))).apply(subject())
    layers = dict(Sparse().apply(pruned).module.named_modules())
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    assert kinds["up_proj"] is SparseLinear
    assert kinds["down_proj"] is nn.Linear


def test_a_step_whose_zeros_are_multiplied_elsewhere_stays_simulated(subject: Subjects) -> None:
    sparse = Sparse(targets=Targets(include=("*up_proj",))).apply(Magnitude(sparsity=0.5).apply(subject()))
    assert [step.execution for step in sparse.history] == ["simulated", "real"]


def test_without_zeros_there_is_nothing_to_do(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"no layer has 30% zeros; .* has most, 0%: prune first"):
        Sparse().apply(subject())
