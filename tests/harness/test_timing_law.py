"""The law of a machine: what cannot be measured is refused beforehand, and a law that was found is kept at once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from optkit.core.errors import OptkitError
from optkit.harness import timing_law
from optkit.harness.machine import known_laws
from optkit.harness.timing_law import measure_law
from optkit.measure.law import Load


def test_models_that_cannot_be_of_a_kind_are_refused_before_anything_is_measured(tiny_llama: Any, tmp_path: Path) -> None:
    folders = []
    for width in (100, 72):
        folders.append(str(tmp_path / f"odd{width}"))
        tiny_llama(intermediate_size=width).save_pretrained(folders[-1])
    with pytest.raises(OptkitError, match=r"odd100 cannot be measured as int4: group_size 64 .*; .*odd72 cannot be measured as int4"):
        measure_law(["float32", "int4"], folders, [4], [1], 1.0, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_several_passes_the_median_of_each_point_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    asked: list[float] = []

    def swept(self: Any, command: str, **arguments: Any) -> Any:
        seconds = (1.0, 9.0, 2.0)[len(asked)]
        asked.append(seconds)
        load = {name: 1.0 for name in Load.__dataclass_fields__}
        what = {"model": arguments["model"], "parameters": 1, "load": load, "seconds": seconds}
        grid = product(arguments["prompts"], arguments["batches"], ("prefill", "decode"))
        points = [{**what, "prompt": prompt, "batch": batch, "phase": phase} for prompt, batch, phase in grid]
        return {"points": points, "skipped": [(9, 1), (1, 1)]}

    monkeypatch.setattr(timing_law.Workers, "ask", swept)
    _, report = measure_law(["float32"], ["shape:llama-1m"], range(1, 8), [1, 2], 1.0, 1, tmp_path / "out", passes=3)
    assert [point.seconds for point in report.kinds[0].points] == [2.0] * 28
    assert report.kinds[0].skipped == ("shape:llama-1m prompt 9 batch 1",)


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
