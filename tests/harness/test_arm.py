"""What an arm gives the transforms that need data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import optkit
from optkit.core.subject import Calibration
from optkit.harness.arm import Arm
from optkit.recipe.reading import recipe_from_dict
from optkit.transforms.distill.losses import Distillation
from optkit.transforms.training.loop import Course, heal


def test_a_transform_that_trains_gets_its_data_the_untouched_model_and_somebody_to_tell(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    draw = torch.Generator().manual_seed(0)
    text.write_text(" ".join(["def x", "return y", "z +", "( 1 )"][number] for number in torch.randint(0, 4, (2000,), generator=draw)))
    recipe = {
        "name": "heal",
        "model": str(model_folder),
        "task": {"language-modeling": {"corpus": {"files": [str(text)]}, "window": 16}},
        "transforms": [{"drop_layers": {"count": 1}}, {"qat": {"steps": 5, "batch_size": 2}}],
    }
    plain = recipe_from_dict(recipe).to_dict()
    seen: list[tuple[nn.Module, Distillation, Calibration]] = []

    def watched(student: nn.Module, loss: Distillation, data: Calibration, course: Course) -> None:
        seen.append((student, loss, data))
        heal(student, loss, data, course)

    monkeypatch.setattr("optkit.transforms.quantize.qat.heal", watched)
    told: list[str] = []
    arm = Arm(0, 1, "", 1, told.append)
    arm.do_baseline(plain, str(tmp_path / "baseline"), None, False, None)
    done = arm.do_transform(
        plain, str(tmp_path / "baseline"), str(tmp_path / "optimized"), [str(tmp_path / "step-1")], str(tmp_path / "kept"), None
    )
    assert [step["name"] for step in done["history"]] == ["drop_layers", "qat"]
    assert [step.name for step in optkit.load(tmp_path / "step-1").history] == ["drop_layers"]
    ((student, loss, data),) = seen
    assert data.checkpoints == tmp_path / "kept" / "2-qat"
    assert len(student.model.layers) == 2  # type: ignore[union-attr,arg-type]
    assert len(loss.teacher.model.layers) == 3
    assert sum(len(batch["input_ids"]) for batch in data.batches) == 10
    assert [text for text in told if text.startswith("applying qat (2 of 2): step ")][-1].startswith(
        "applying qat (2 of 2): step 5 of 5, loss"
    )
