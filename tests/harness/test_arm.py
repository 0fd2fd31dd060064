"""What an arm gives the transforms that need data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optkit.core.subject import Calibration
from optkit.harness.arm import Arm
from optkit.recipe.reading import recipe_from_dict
from optkit.transforms.quantize.healing import Course, heal


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
    seen: list[tuple[nn.Module, Any, Calibration, Course]] = []

    def watched(student: nn.Module, teacher: Any, data: Calibration, course: Course) -> None:
        seen.append((student, teacher, data, course))
        heal(student, teacher, data, course)

    monkeypatch.setattr("optkit.transforms.quantize.qat.heal", watched)
    told: list[str] = []
    arm = Arm(0, 1, "", 1, told.append)
    arm.do_baseline(plain, str(tmp_path / "baseline"), None, False, None)
    done = arm.do_transform(plain, str(tmp_path / "baseline"), str(tmp_path / "optimized"), None)
    assert [step["name"] for step in done["history"]] == ["drop_layers", "qat"]
    ((student, teacher, data, _),) = seen
    assert len(student.model.layers) == 2  # type: ignore[union-attr,arg-type]
    assert len(teacher.model.layers) == 3
    assert sum(len(batch["input_ids"]) for batch in data.batches) == 10
    assert [text for text in told if text.startswith("applying qat (2 of 2): step ")][-1].startswith(
        "applying qat (2 of 2): step 5 of 5, loss"
    )
