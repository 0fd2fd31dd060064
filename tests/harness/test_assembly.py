"""From results to a report: what a simulated speed may claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optkit.core.measurement import Comparison, Metric
from optkit.harness import assembly
from optkit.recipe.reading import recipe_from_dict

TIME = Metric("tpot_ms", "ms", False, lambda c: np.median(c["ms"], axis=-1), lambda c: c["ms"])


@pytest.mark.parametrize("simulated", [False, True])
def test_a_limit_on_a_simulated_speed_does_not_hold_and_one_on_size_does(simulated: bool) -> None:
    arms = assembly._Arms()
    for arm in ("baseline", "optimized"):
        arms.sample(arm, assembly._Sampled(TIME, {"ms": np.ones(3)}, timed=True))
        arms.count(arm, "artefact_bytes", "bytes", 1.0)
    comparisons = [Comparison("optimized", name, 1.0, 0.5, 0.5, 0.4, 0.6, "better") for name in ("tpot_ms", "artefact_bytes")]
    recipe: Any = recipe_from_dict({"name": "x", "limits": {"tpot_ms": 0.9, "artefact_bytes": 0.9}})
    limits = assembly._limits(recipe, arms, comparisons, simulated)
    assert {limit.metric: limit.held for limit in limits} == {"tpot_ms": not simulated, "artefact_bytes": True}
