"""The one command to check is part of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("gate", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join)
def test_a_gate_is_open(gate):
    done = subprocess.run([sys.executable, "-m", *gate], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_command_is_the_same_everywhere():
    command = "ruff check . && ruff format --check . && mypy"
    assert command in (ROOT / "CONTRIBUTING.md").read_text()
    assert command in (ROOT / ".pre-commit-config.yaml").read_text()
