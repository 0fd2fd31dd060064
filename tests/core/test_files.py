"""The one door for writes: whole or not there, sealed, exclusive."""

from __future__ import annotations

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.core import files
from optkit.core.errors import ArtefactError, ResourceError


def filled(folder: Path) -> Path:
    with files.build_folder(folder) as aside:
        (aside / "deep").mkdir()
        (aside / "weights.bin").write_bytes(random.Random(0).randbytes(4096))
        (aside / "deep" / "note.txt").write_text("nothing is lost\n")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"ä": [1, None]}
    files.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert files.read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "is missing"), (b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[" * 100_000, "cannot be read")],
    ids=["missing", "cut", "not UTF-8", "deep"],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, text: bytes | None, expected: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ArtefactError, match=f"a.json {expected}"):
        files.read_json(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda of: st.lists(of) | st.dictionaries(st.text(), of),
    )
)
def test_json_says_the_same_however_it_is_laid_out(value: Any) -> None:
    assert json.loads(files.json_text(value)) == value


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.none() | st.booleans(), min_size=1))
def test_a_list_of_numbers_takes_one_line(numbers: list[Any]) -> None:
    assert files.json_text({"samples": numbers}).count("\n") == 3


def test_a_path_that_is_no_utf8_is_escaped() -> None:
    assert files.json_text(["a\udcff"]) == '[\n "a\\udcff"\n]\n'


def test_a_folder_appears_whole_and_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "result"
    with files.build_folder(folder) as aside:
        (aside / "a").write_text("a")
        assert not folder.exists()
    assert files.is_sealed(folder)
    assert set(files.verify(folder)["files"]) == {"a"}
    assert [path.name for path in folder.parent.iterdir()] == ["result"]


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.build_folder(tmp_path / "result") as aside:
        (aside / "a").write_text("a")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_exists_is_not_overwritten(tmp_path: Path, what: str) -> None:
    place = tmp_path / "result"
    if what == "file":
        place.write_text("old")
    else:
        place.mkdir()
        (place / "old").write_text("old")
    with pytest.raises(ArtefactError, match="exists already and is not overwritten"), files.build_folder(place):
        pass
    assert (place if what == "file" else place / "old").read_text() == "old"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    files.verify(filled(tmp_path / "result"))


def test_seal_keeps_what_the_manifest_said_already(tmp_path: Path) -> None:
    files.write_json(tmp_path / "optkit.json", {"schema": 7, "history": []})
    (tmp_path / "a").write_text("a")
    files.seal(tmp_path, "optkit.json")
    content = files.verify(tmp_path, "optkit.json")
    assert content["schema"] == 7
    assert content["files"]["a"]["size"] == 1


def test_a_hundred_single_bits_are_flipped_and_all_are_found(tmp_path: Path) -> None:
    folder = filled(tmp_path / "result")
    draw = random.Random(1)
    for _ in range(100):
        path = folder / draw.choice(["weights.bin", "deep/note.txt"])
        good = path.read_bytes()
        place = draw.randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        with pytest.raises(ArtefactError, match=f"{path.name}: changed"):
            files.verify(folder)
        path.write_bytes(good)
    files.verify(folder)


def test_a_flipped_bit_of_the_manifest_is_never_a_traceback(tmp_path: Path) -> None:
    folder = filled(tmp_path / "result")
    good = (folder / files.MANIFEST).read_bytes()
    found = 0
    for place in range(len(good)):
        (folder / files.MANIFEST).write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 7]) + good[place + 1 :])
        try:
            files.verify(folder)
        except ArtefactError:
            found += 1
    assert found > 0.8 * len(good)


def test_all_files_that_are_missing_or_changed_are_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "result")
    (folder / "weights.bin").unlink()
    (folder / "deep" / "note.txt").write_text("something is lost")
    with pytest.raises(ArtefactError) as caught:
        files.verify(folder)
    assert "weights.bin: missing" in str(caught.value)
    assert "deep/note.txt: changed" in str(caught.value)


def test_a_folder_without_a_manifest_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not a finished result"):
        files.verify(tmp_path)
    files.write_json(tmp_path / files.MANIFEST, ["not", "a", "manifest"])
    with pytest.raises(ArtefactError, match="lists no files"):
        files.verify(tmp_path)


def test_ten_threads_get_ten_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(files.new_folder, [tmp_path / "runs"] * 10))
    assert sorted(path.name for path in made) == [f"{number:04d}" for number in range(1, 11)]
    assert all(path.is_dir() for path in made)


def test_ten_processes_get_ten_folders(tmp_path: Path) -> None:
    with ProcessPoolExecutor(10, mp_context=multiprocessing.get_context("fork")) as pool:
        made = list(pool.map(files.new_folder, [tmp_path / "runs"] * 10))
    assert len(set(made)) == 10


def test_numbers_go_on_after_the_highest_and_other_names_do_not_disturb(tmp_path: Path) -> None:
    for name in ("0003", "0012", "notes", ".aside"):
        (tmp_path / name).mkdir()
    assert files.new_folder(tmp_path).name == "0013"


def test_an_error_of_a_library_in_rust_is_understood(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the disk is full"), files.refusals(tmp_path):
        raise Exception("I/O error: No space left on device (os error 28)")
    with pytest.raises(Exception, match="os error 2"), files.refusals(tmp_path):
        raise Exception("No such file or directory (os error 2)")


def test_other_errors_of_the_system_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.refusals(tmp_path):
        (tmp_path / "missing").read_text()
