"""The folder of a run: nobody shares it, finished stages stay, interrupted ones are done again, changed inputs are refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optkit.core import files
from optkit.core.errors import ArtefactError, OptkitError, ResourceError
from optkit.harness.folder import RunFolder

INPUTS: dict[str, Any] = {"recipe": {"name": "tiny", "transforms": [{"int8": {}}]}, "threads": 2, "model_sha256": "abc", "task": None}


def unfinished(parent: Path, inputs: dict[str, Any] = INPUTS) -> Path:
    with RunFolder.new(parent, inputs) as folder:
        return folder.path


def test_every_new_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with RunFolder.new(tmp_path / "deep" / "tiny", INPUTS) as first, RunFolder.new(tmp_path / "deep" / "tiny", INPUTS) as second:
        assert [first.path.name, second.path.name] == ["0001", "0002"]
        assert files.read_json(first.work / "inputs.json") == INPUTS


def test_ten_processes_at_once_get_ten_folders(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from optkit.harness.folder import RunFolder; sys.stdin.read()\n" + (
        "with RunFolder.new(Path(sys.argv[1]), {}) as folder: folder.stage('done', lambda: 1); print(folder.path.name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tiny")]
    root = Path(__file__).parents[2]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(10)]
    for process in runs:  # all have imported what they need and wait for the word
        assert process.stdin is not None
        process.stdin.close()
    names = {process.stdout.read().strip() for process in runs if process.stdout is not None}
    assert [process.wait(timeout=30) for process in runs] == [0] * 10
    for process in runs:
        assert process.stdout is not None
        process.stdout.close()
    assert names == {f"{number:04d}" for number in range(1, 11)}


def test_resuming_takes_the_latest_unfinished_run(tmp_path: Path) -> None:
    first, second = unfinished(tmp_path), unfinished(tmp_path)
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        assert folder.path == second
        with RunFolder.resumed(tmp_path, INPUTS) as other:
            assert other.path == first
            with pytest.raises(OptkitError, match="being worked on by other processes"):
                RunFolder.resumed(tmp_path, INPUTS)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    with RunFolder.new(tmp_path, INPUTS) as folder:
        folder.finish()
    with pytest.raises(OptkitError, match="has no unfinished run; leave --resume out"):
        RunFolder.resumed(tmp_path, INPUTS)


def test_a_folder_without_inputs_is_rubbish(tmp_path: Path) -> None:
    (tmp_path / "0001" / "work").mkdir(parents=True)
    with pytest.raises(OptkitError, match="no unfinished run"):
        RunFolder.resumed(tmp_path, INPUTS)
    with pytest.raises(OptkitError, match="no unfinished run"):
        RunFolder.resumed(tmp_path / "nothing", INPUTS)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that works on a run and waits."""
    code = (
        "import sys; from pathlib import Path; from optkit.harness.folder import RunFolder\n"
        f"with RunFolder.new(Path(sys.argv[1]), {INPUTS!r}) as folder: print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_run_that_another_process_works_on_is_refused_until_that_process_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(OptkitError, match="being worked on"):
        RunFolder.resumed(tmp_path, INPUTS)
    holder.kill()
    holder.wait()
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        assert folder.path.name == "0001"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threads": 4}, "threads: 2 then, 4 now"),
        ({"model_sha256": "abd"}, "model_sha256: 'abc' then, 'abd' now"),
        ({"recipe": {"name": "tiny", "transforms": [{"int4": {}}]}}, "transforms[0]"),
        ({"recipe": {"name": "tiny", "transforms": []}}, "transforms"),
        ({"recipe": {"name": "tiny", "transforms": [{"int8": {"rows": 3}}]}}, "recipe.transforms[0].int8.rows: None then, 3 now"),
        ({"extra": True}, "extra: None then, True now"),
    ],
)
def test_changed_inputs_are_refused_and_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    unfinished(tmp_path)
    with pytest.raises(OptkitError) as refused:
        RunFolder.resumed(tmp_path, INPUTS | change)
    assert named in str(refused.value)
    assert "leave --resume out to begin a new run" in str(refused.value)


def test_all_changes_are_named_at_once_and_nothing_else(tmp_path: Path) -> None:
    unfinished(tmp_path)
    with pytest.raises(OptkitError) as refused:
        RunFolder.resumed(tmp_path, INPUTS | {"threads": 4, "model_sha256": "abd"})
    assert len(str(refused.value).splitlines()) == 4


def test_a_refused_run_is_free_for_the_next_one(tmp_path: Path) -> None:
    unfinished(tmp_path)
    with pytest.raises(OptkitError, match="threads"):
        RunFolder.resumed(tmp_path, INPUTS | {"threads": 4})
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        assert folder.path.name == "0001"


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    unfinished(tmp_path)
    done = []
    for _ in range(2):
        with RunFolder.resumed(tmp_path, INPUTS) as folder:
            assert folder.has("timing") is bool(done)
            assert folder.stage("timing", lambda: done.append(1) or {"ms": [1.5]}) == {"ms": [1.5]}
    assert done == [1]


def test_an_interrupted_stage_is_done_again_from_nothing(tmp_path: Path) -> None:
    unfinished(tmp_path)

    def interrupted() -> None:
        (folder.work / "baseline").mkdir()
        (folder.work / "baseline" / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with RunFolder.resumed(tmp_path, INPUTS) as folder, pytest.raises(KeyboardInterrupt):
        folder.stage("baseline", interrupted)
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        assert not folder.has("baseline")
        assert folder.stage("baseline", lambda: (folder.work / "baseline").exists()) is False


def test_what_a_killed_process_was_still_writing_is_swept_away(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    (run / "work" / ".answers.77.aside").mkdir()
    (run / "work" / ".answers.77.aside" / "half").write_text("")
    (run / "work" / ".timing.json.77.aside").write_text("{")
    (run / ".report.json.77.aside").write_text("{")
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        folder.finish()
    assert sorted(path.name for path in run.iterdir()) == ["manifest.json"]


def test_a_result_that_is_no_json_is_not_kept(tmp_path: Path) -> None:
    with RunFolder.new(tmp_path, INPUTS) as folder:
        with pytest.raises(ValueError, match="JSON"):
            folder.stage("timing", lambda: float("nan"))
        assert not folder.has("timing")


def test_a_run_that_dies_while_it_finishes_can_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.new(tmp_path, INPUTS) as folder:
        (folder.work / "optimized").mkdir()
        (folder.work / "optimized" / "weights").write_text("w")
        folder.keep_artefact("optimized")
        monkeypatch.setattr(files, "seal", _full_disk)
        with pytest.raises(ResourceError):
            folder.finish()
    monkeypatch.undo()
    with pytest.raises(ArtefactError, match="not a finished result"):
        files.verify(folder.path)
    with RunFolder.resumed(tmp_path, INPUTS) as folder:
        folder.keep_artefact("optimized")
        folder.finish()
    assert list(files.verify(folder.path)["files"]) == []
    assert (folder.path / "artefact" / "weights").read_text() == "w"
    assert not folder.work.exists()


def _full_disk(*places: Any, **options: Any) -> None:
    raise ResourceError("the disk is full")
