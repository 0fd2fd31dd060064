"""The law of a machine: what cannot be measured is refused beforehand, and a law that was found is kept at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optkit.core.errors import OptkitError
from optkit.harness import timing_law
from optkit.harness.machine import known_laws
from optkit.harness.timing_law import measure_law


def test_models_that_cannot_be_of_a_kind_are_refused_before_anything_is_measured(tiny_llama: Any, tmp_path: Path) -> None:
    folders = []
    for width in (100, 72):
        folders.append(str(tmp_path / f"odd{width}"))
        tiny_llama(intermediate_size=width).save_pretrained(folders[-1])
    with pytest.raises(OptkitError, match=r"odd100 cannot be measured as int4: group_size 64 .*; .*odd72 cannot be measured as int4"):
        measure_law(["float32", "int4"], folders, [4], [1], 1.0, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_law_is_kept_even_if_a_later_kind_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    judged = timing_law._judged

    def failing(kind: str, points: Any, skipped: Any) -> Any:
        if kind == "int8":
            raise OptkitError("no power")
        return judged(kind, points, skipped)

    monkeypatch.setattr(timing_law, "_judged", failing)
    with pytest.raises(OptkitError, match="no power"):
        measure_law(["float32", "int8"], ["shape:llama-1m"], [2, 4, 6, 8], [1, 2], 0.5, 1, tmp_path / "out")
    assert set(known_laws(1)) == {"float32"}
