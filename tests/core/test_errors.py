"""The family of refusals."""

from __future__ import annotations

import pytest

from optkit.core import errors
from optkit.core.errors import OptkitError, Problem, ProblemsError, StoppedError

CODES = {"MissingError": 3, "ResourceError": 4, "ArmError": 70, "StoppedError": 130}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_refusal_belongs_to_the_family_and_knows_its_exit_code(kind: type[OptkitError]) -> None:
    assert issubclass(kind, OptkitError)
    made = kind("m.yaml", ()) if kind is ProblemsError else kind("stopped")
    assert made.exit_code == CODES.get(kind.__name__, 2)


def test_problems_are_printed_in_order_of_their_lines_in_columns() -> None:
    error = ProblemsError("r.yaml", [Problem(12, "measure", "twelve"), Problem(0, "", "whole"), Problem(3, "transforms[0].int4", "three")])
    assert str(error).splitlines() == [
        "r.yaml: 3 problems",
        "  file                          whole",
        "  line 3    transforms[0].int4  three",
        "  line 12   measure             twelve",
    ]


def test_one_problem_is_not_called_problems() -> None:
    assert str(ProblemsError("r.yaml", [Problem(1, "name", "missing")])).startswith("r.yaml: 1 problem\n")


def test_a_stop_carries_the_code_of_its_signal() -> None:
    assert StoppedError("SIGTERM", 143).exit_code == 143
