"""The bench of kernels: every contender is timed, its bytes are counted, and the reference fits the number of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from optkit.cli import app
from optkit.core import files
from optkit.harness.kernel_bench import BFLOAT16, ROOF, Case, bench_kernels
from optkit.report.bench import Line, to_json, to_markdown

SMALL = {"rows": 32, "cols": 128, "weights": 3 * 32 * 128}
KERNELS = {
    BFLOAT16,
    "float32 linear",
    "int8",
    "int8 by int8",
    "int4 g32",
    "int4 g64",
    "int4 g128",
    "PyTorch _int_mm, rounding left out",
    "PyTorch _weight_int8pack_mm",
    "PyTorch _weight_int4pack_mm g64",
}


@pytest.fixture(scope="module")
def one_token() -> list[Line]:
    return bench_kernels(Case(**SMALL), seconds=0.05, threads=1)


def test_one_token_is_set_against_a_sweep_that_only_reads(one_token: list[Line]) -> None:
    assert {line.kernel for line in one_token} == KERNELS | {ROOF}
    assert one_token[0].kernel == ROOF
    assert one_token[0].ratio is None
    for line in one_token[1:]:
        assert line.against == ROOF
        assert line.ratio is not None
        assert line.low is not None
        assert line.high is not None
        assert 0 < line.low <= line.ratio <= line.high


def test_many_tokens_are_set_against_bfloat16() -> None:
    lines = bench_kernels(Case(**SMALL, tokens=40), seconds=0.05, threads=1)
    assert {line.kernel for line in lines} == KERNELS
    assert {line.against for line in lines} == {BFLOAT16}
    assert [line.kernel for line in lines if line.ratio is None] == [BFLOAT16]


def test_the_bytes_of_every_format_are_counted(one_token: list[Line]) -> None:
    weights, rows = 3 * 32 * 128, 3 * 32
    found = {line.kernel: line.weight_bytes for line in one_token}
    assert found["float32 linear"] == 4 * weights
    assert found[BFLOAT16] == 2 * weights
    assert found["int8"] == weights + 4 * rows
    assert found["int4 g64"] == weights // 2 + 4 * weights // 64
    assert all(line.bytes_per_second == pytest.approx(line.weight_bytes / line.ms * 1e3) for line in one_token)


def test_the_forms_hold_every_line(one_token: list[Line]) -> None:
    found = json.loads(to_json(one_token, SMALL, {"cpu": "any"}))
    assert found["schema"] == 1
    assert [Line(**line) for line in found["lines"]] == one_token
    table = to_markdown(one_token, "Kernels")
    assert all(line.kernel.replace("_", "") in table.replace("\\", "").replace("_", "") for line in one_token)


def test_the_command_leaves_a_sealed_folder(tmp_path: Path) -> None:
    words: list[Any] = ["bench", "kernels", "--tokens", 1, "--rows", 32, "--cols", 128, "--weights", 4096, "--seconds", 0.1, "--threads", 1]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "bench-kernels" / "0001"
    assert files.verify(folder)["files"].keys() == {"bench.json", "table.md"}
    assert json.loads(done.stdout) == json.loads((folder / "bench.json").read_text())
