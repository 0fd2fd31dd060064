"""The commands that only look: list, schema, check, verify; and what every command promises about output and exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import optkit as package
from optkit.cli import progress
from optkit.core import files
from optkit.harness import run as harness_run
from optkit.measure import METERS
from optkit.models.shapes import SHAPES
from optkit.report import record
from optkit.tasks import TASKS
from optkit.transforms import TRANSFORMS

ROOT = Path(__file__).parents[2]
Optkit = Callable[..., Any]


def test_list_names_everything_a_recipe_can_use(optkit: Optkit) -> None:
    said = optkit("list")
    assert said.code == 0
    for name in (*TRANSFORMS, *METERS, *TASKS, *SHAPES):
        assert name in said.out
    assert "group_size = " in said.out
    assert said.err == ""


def test_list_as_json_has_a_summary_and_the_settings_of_each(optkit: Optkit) -> None:
    listed = json.loads(optkit("list", "--json").out)
    assert listed["transforms"].keys() == set(TRANSFORMS)
    assert listed["meters"].keys() == set(METERS)
    assert listed["tasks"].keys() == set(TASKS)
    assert all(entry["summary"] for kind in ("transforms", "meters", "tasks", "models") for entry in listed[kind].values())
    assert listed["meters"]["latency"]["settings"]["new_tokens"] == {"default": 64, "description": "tokens generated for each prompt"}


def test_schema_prints_the_schema_of_recipes(optkit: Optkit) -> None:
    said = optkit("schema")
    assert said.code == 0
    assert "transforms" in json.loads(said.out)["properties"]


def test_check_says_what_a_good_recipe_would_do(optkit: Optkit, recipe: Callable[..., Path], home: Path) -> None:
    said = optkit("check", recipe(transforms=["magnitude", "int8"]))
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("tiny.yaml: fine (magnitude, int8)\n")
    assert [path.name for path in home.iterdir()] == ["tiny.yaml"]


def test_check_reads_the_overrides_too(optkit: Optkit, recipe: Callable[..., Path]) -> None:
    file = recipe()
    assert optkit("check", file, "--set", "transforms=[]").out.endswith("fine (no transforms)\n")
    assert optkit("check", file, "--set", "transforms=[{int4: {group_size: 48}}]").code == 2


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "0001"
    (folder / "artefact").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "artefact" / "model.safetensors").write_bytes(bytes(range(256)))
    files.seal(folder / "artefact", "optkit.json")
    files.seal(folder, without=("artefact",))
    return folder


def test_verify_finds_a_result_and_an_artefact_whole(optkit: Optkit, sealed: Path) -> None:
    said = optkit("verify", sealed, sealed / "artefact")
    assert said.code == 0
    assert said.out.splitlines() == [f"{sealed}: 2 files as written", f"{sealed / 'artefact'}: 1 file as written"]


@pytest.mark.parametrize("place", [0, 100, 255])
def test_verify_names_the_file_of_which_one_bit_has_changed(optkit: Optkit, sealed: Path, place: int) -> None:
    file = sealed / "artefact" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    said = optkit("verify", sealed)
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[1:] == ["  model.safetensors: changed"]


def test_verify_names_what_is_missing_and_what_is_no_result(optkit: Optkit, sealed: Path, tmp_path: Path) -> None:
    (sealed / "report.json").unlink()
    assert "report.json: missing" in optkit("verify", sealed).err
    for folder, why in ((tmp_path, "is not a finished result"), (tmp_path / "nowhere", "does not exist")):
        said = optkit("verify", folder)
        assert said.code == 2
        assert why in said.err


def test_verify_goes_on_after_a_bad_folder(optkit: Optkit, sealed: Path, tmp_path: Path) -> None:
    said = optkit("verify", tmp_path / "nowhere", sealed)
    assert said.code == 2
    assert said.out == f"{sealed}: 2 files as written\n"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_verify_vouches_for_nothing_outside_the_folder(optkit: Optkit, sealed: Path, name: str) -> None:
    (sealed.parent / "outside").write_text("x")
    manifest = json.loads((sealed / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": files.digest(sealed.parent / "outside"), "size": 1}
    (sealed / "manifest.json").write_text(json.dumps(manifest))
    said = optkit("verify", sealed)
    assert said.code == 2
    assert f"lists {name}, which lies outside the folder" in said.err


def test_the_version_is_told(optkit: Optkit) -> None:
    said = optkit("--version")
    assert (said.code, said.out.split()[0]) == (0, "optkit")


def test_compare_overwrites_nothing(optkit: Optkit, tmp_path: Path) -> None:
    (tmp_path / "keep.csv").write_text("precious")
    (tmp_path / "link.csv").symlink_to(tmp_path / "link.csv")
    runs = ROOT / "experiments" / "int8"
    for place, why in (("keep.csv", "is not overwritten"), ("link.csv", "is not overwritten"), ("no/such.csv", "there is no folder")):
        said = optkit("compare", runs, "--csv", "--out", tmp_path / place)
        assert said.code == 2
        assert why in said.err
    assert (tmp_path / "keep.csv").read_text() == "precious"


def report(held: bool) -> record.Report:
    """Return a report of nothing but one limit."""
    metric = record.Metric(value=1.0, unit="ms", samples=(1.0,), higher_is_better=False)
    arm = record.Arm(label="untouched", execution="real", opens_in="transformers", dtype="float32", metrics={"tpot_ms": metric})
    return record.Report(
        run=record.Run(
            id="0001", name="tiny", started="2026-01-01T00:00:00+00:00", seconds=1, quick=True, recipe_sha256="", stopped_because=""
        ),
        environment={},
        model=record.Model(source="tiny", parameters=1, sha256="", trained=True),
        data=None,
        arms={"baseline": arm, "optimized": arm},
        limits=(record.Limit(metric="tpot_ms", limit=0.5, ratio=1.0, held=held),),
    )


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)])
def test_a_limit_that_does_not_hold_ends_with_code_1(
    optkit: Optkit, monkeypatch: pytest.MonkeyPatch, home: Path, held: bool, code: int
) -> None:
    monkeypatch.setattr(harness_run, "run", lambda *args, **options: report(held))
    shown = optkit("run", "tiny.yaml", "--out", "there")
    assert shown.code == code
    assert "written to there/tiny/0001" in shown.out
    alone = optkit("run", "tiny.yaml", "--json")
    assert alone.code == code
    assert json.loads(alone.out)["limits"][0]["held"] is held


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("ours"), 70, "please report it"),
        (package.OptkitError("bad input"), 2, "bad input"),
    ],
    ids=["Ctrl-C", "mistake", "refusal"],
)
def test_each_way_to_fail_has_its_exit_code(
    optkit: Optkit, monkeypatch: pytest.MonkeyPatch, home: Path, error: BaseException, code: int, told: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(harness_run, "run", fail)
    said = optkit("run", "tiny.yaml")
    assert (said.code, said.out) == (code, "")
    assert told in said.err
    assert ("Traceback" in said.err) is (code == 70)


def test_options_of_run_reach_the_harness(optkit: Optkit, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(harness_run, "run", lambda recipe, **options: given.update(options, recipe=recipe) or report(True))
    words = ["run", "a b.yaml", "--out", "o", "--quick", "--resume", "--set", "threads=1", "--set", "seed=2", "--trust-remote-code"]
    assert optkit(*words).code == 0
    del given["progress"]
    assert given == {
        "recipe": Path("a b.yaml"),
        "out": Path("o"),
        "quick": True,
        "resume": True,
        "overrides": ("threads=1", "seed=2"),
        "trust_remote_code": True,
        "command": "optkit run 'a b.yaml' --out o --quick --resume --set threads=1 --set seed=2 --trust-remote-code",
    }


def call(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "optkit", *words], env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("command", ["--help", "schema"])
def test_a_reader_that_goes_away_ends_the_command_with_code_141(command: str) -> None:
    with call(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=200) == 141


def test_an_output_that_is_full_ends_the_command_with_code_4() -> None:
    with Path("/dev/full").open("wb") as full, call("--help", stdout=full) as process:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 4
        assert said == b"cannot write standard output: the disk is full\n"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys, optkit.cli\ntry: optkit.cli.main()\nfinally: sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert not {"torch", "transformers", "pandas", "numpy"} & set(done.stderr.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # processor time: the clock may be shared


def test_progress_without_a_terminal_is_a_line_for_each_new_thing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown() as tell:
        tell("opening baseline", None)
        tell("opening baseline", None)
        tell("timing, batch 1: round 1", 0.1)
        tell("timing, batch 1: round 2", 0.2)
        now = 31.0
        tell("timing, batch 1: round 3", 0.5)
    assert capsys.readouterr().err.splitlines() == [
        "opening baseline",
        "timing, batch 1: round 1 (10% of the time)",
        "timing, batch 1: round 3 (50% of the time)",
    ]


def test_progress_on_a_terminal_is_drawn_by_no_thread_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with progress.shown() as tell:
        tell("timing, batch 1: round 1", 0.1)
        tell("opening baseline", None)
        assert threading.active_count() == before
    assert "opening baseline" in capsys.readouterr().err
