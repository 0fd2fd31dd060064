"""Twelve architectures by what looks at calibration data: every cell works from check to an artefact, or is refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import OptkitError
from optkit.core.subject import Calibration, Subject
from optkit.models.sources import outline_model
from optkit.transforms import Int8, LowRank, Mixed, Plan, PruneFfn, PruneHeads, PruneHidden, Smoothquant, Sparsegpt, Transform, Wanda

_SPEC = importlib.util.spec_from_file_location("twelve", Path(__file__).parent / "test_twelve_architectures.py")
assert _SPEC is not None and _SPEC.loader is not None
twelve: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(twelve)

TRANSFORMS: dict[str, tuple[Transform, ...]] = {
    "dynamic": (Int8(activations="dynamic"),),
    "static": (Int8(activations="static"),),
    "mixed": (Mixed(bits=6.0, group_size=32),),
    "smoothquant": (Smoothquant(through="all"), Int8(activations="dynamic")),
    "wanda": (Wanda(sparsity=0.1),),
    "sparsegpt": (Sparsegpt(sparsity=0.1),),
    "low_rank": (LowRank(ratio=0.1),),
    "prune_ffn": (PruneFfn(ratio=0.25, multiple=32),),
    "prune_heads": (PruneHeads(ratio=0.5),),
    "prune_hidden": (PruneHidden(ratio=0.125, multiple=8),),
}
UNSAID = "cannot have fewer groups of heads: its configuration has no number for that; prune another width"
REFUSED = {
    ("bloom", "prune_ffn"): "has no one number for the width of its feed-forward layers",
    ("mixtral", "prune_ffn"): r"experts \(MixtralExperts\) has a size that goes with the feed-forward units, and is no linear layer",
    ("olmo2", "prune_heads"): r"q_norm \(Olmo2RMSNorm\) has a size that goes with the groups of heads, and is no linear layer",
    ("gemma3", "prune_hidden"): "embed_tokens multiplies by a number that follows from the hidden width; prune another width",
    ("mixtral", "prune_hidden"): r"gate \(MixtralTopKRouter\) has a size that goes with the hidden units, and is no linear layer",
    **{(name, "prune_hidden"): "does not follow from 64 hidden units; prune another" for name in ("gpt2", "opt", "gpt_neox", "bloom")},
    **{(name, "prune_heads"): UNSAID for name in ("gpt2", "opt", "gpt_neox", "bloom")},
}
CELLS = [(model, name) for model in twelve.ARCHITECTURES for name in TRANSFORMS if (model, name) not in REFUSED]
Logits = Callable[[nn.Module], Tensor]


def with_remedy(name: str, step: Transform) -> Transform:
    return step.model_copy(update={"targets": twelve.REMEDY[name]}) if name in twelve.REMEDY and hasattr(step, "targets") else step


@pytest.mark.parametrize(("name", "transform"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_a_cell_works_from_check_to_an_artefact(
    name: str, transform: str, calibration: Calibration, logits: Logits, tmp_path: Path
) -> None:
    if name == "mixtral":  # all experts must see data
        calibration = Calibration(tuple({"input_ids": torch.randint(2, 96, (8, 16))} for _ in range(2)))
    steps = [with_remedy(name, step) for step in TRANSFORMS[transform]]
    with torch.device("meta"):
        outline = Subject(twelve.build(name), name)
        for step in steps:
            step.check(Plan(outline))
            outline = step.preview(outline)
    whole = Subject(twelve.build(name), name)
    dense = logits(whole.module)
    for step in steps:
        whole = step.apply(whole, calibration)
    answers = logits(whole.module)
    assert 0 < (answers - dense).norm() < (1.0 if transform.startswith("prune") else 0.5) * dense.norm()
    if transform not in ("mixed", "low_rank"):  # whose choice is not known before
        foretold = {key: tensor.shape for key, tensor in outline.module.state_dict().items()}
        assert {key: tensor.shape for key, tensor in whole.module.state_dict().items()} == foretold
    optkit.save(whole, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    assert torch.equal(logits(again.module), answers)
    assert outline_model(str(tmp_path / "saved")).history == again.history == whole.history

    if whole.opens_in == "transformers":
        from transformers import AutoModelForCausalLM

        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()), answers)


@pytest.mark.parametrize(("name", "transform"), list(REFUSED), ids=["-".join(cell) for cell in REFUSED])
def test_a_width_that_cannot_be_pruned_is_refused_by_name_on_shapes_alone(name: str, transform: str) -> None:
    with torch.device("meta"), pytest.raises(OptkitError, match=REFUSED[name, transform]):
        TRANSFORMS[transform][0].check(Plan(Subject(twelve.build(name), name)))


@pytest.mark.parametrize("transform", ["dynamic", "static", "mixed"])
@pytest.mark.parametrize("name", ["mixtral"])
def test_what_int8_refuses_is_refused_here_with_the_same_remedy(name: str, transform: str) -> None:
    words = twelve.REFUSED[name, "int8"]
    with torch.device("meta"), pytest.raises(OptkitError, match=words):
        TRANSFORMS[transform][0].check(Plan(Subject(twelve.build(name), name)))


@pytest.mark.parametrize("name", list(twelve.ARCHITECTURES))
def test_smoothing_leaves_the_answers_of_every_architecture(name: str, calibration: Calibration, logits: Logits) -> None:
    dense, smooth = twelve.build(name), Smoothquant(through="all").apply(twelve.build(name), calibration)
    assert (logits(smooth) - logits(dense)).norm() < 1e-4 * logits(dense).norm()
    assert any(not torch.equal(tensor, dense.state_dict()[key]) for key, tensor in smooth.state_dict().items())
