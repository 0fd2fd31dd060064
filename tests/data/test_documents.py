"""Documents from files and the Hub, and their split."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.core.errors import DataError, MissingError
from optkit.data.documents import Corpus, file_corpus, hub_corpus, python_corpus, split

TEXTS = [f"document number {number}: " + "words " * number for number in range(64)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def all_texts(corpus: Corpus) -> set[str]:
    return {*corpus.calibration, *corpus.evaluation}


@given(st.lists(st.text(max_size=30), max_size=50))
@settings(max_examples=200)
def test_no_text_stands_on_both_sides(texts: list[str]) -> None:
    try:
        corpus = split("drawn", texts)
    except DataError:
        assert not any(text.strip() for text in texts)
        return
    assert not set(corpus.calibration) & set(corpus.evaluation)
    assert sum(map(len, corpus.evaluation)) <= sum(map(len, set(texts)))


def test_many_documents_are_split_whole_and_the_same_in_any_order() -> None:
    corpus, turned = split("a", TEXTS), split("a", TEXTS[::-1])
    assert all_texts(corpus) == set(TEXTS)
    assert 1 <= len(corpus.calibration) <= 20
    assert set(corpus.calibration) == set(turned.calibration)


def test_a_document_more_moves_none_of_the_others() -> None:
    before, after = split("a", TEXTS[:-1]), split("a", TEXTS)
    assert set(before.calibration) <= set(after.calibration)
    assert set(before.evaluation) <= set(after.evaluation)


def test_a_single_document_is_cut_and_lost_nowhere() -> None:
    corpus = split("one", ["0123456789abcdef"])
    assert (corpus.calibration, corpus.evaluation) == (("01",), ("23456789abcdef",))


def test_a_document_equal_to_the_beginning_of_another_is_not_in_both() -> None:
    corpus = split("two", ["abcdefg", "abcdefg" * 8])
    assert not set(corpus.calibration) & set(corpus.evaluation)


def test_the_same_document_twice_counts_once() -> None:
    assert split("a", TEXTS + TEXTS).sha256 == split("a", TEXTS).sha256


def test_the_digest_tells_texts_and_their_borders_apart() -> None:
    digests = {Corpus("n", (), texts).sha256 for texts in (("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"))}
    assert len(digests) == 4


@pytest.mark.parametrize("texts", [[], [""], ["  \n", "\t"]], ids=["none", "empty", "blank"])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"corpus 'void' is empty"):
        split("void", texts)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".rst", ""])
def test_plain_text_files_are_documents(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02d}{suffix}").write_text(text)
    corpus = file_corpus([str(tmp_path / f"*{suffix}")], "text")
    assert all_texts(corpus) == set(TEXTS)
    assert corpus.name == f"*{suffix}"


def test_rows_of_jsonl_are_documents_in_the_named_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "n": 1} for text in TEXTS] + ["", "  "])
    assert all_texts(file_corpus([str(path)], "body")) == set(TEXTS)


def test_line_separators_within_a_json_text_do_not_part_rows(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x1cfive" * 8
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    corpus = file_corpus([str(path)], "text")
    assert "".join((*corpus.calibration, *corpus.evaluation)) == text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{broken", "row 3 is no JSON"),
        ({"body": "x"}, "row 3 has no field 'text'; it has body"),
        ({"text": None}, "row 3 has no text in 'text', but NoneType"),
        ({"text": 7}, "row 3 has no text in 'text', but int"),
        (["text"], "row 3 has no field 'text'; it has list"),
        ('{"text": "\\ud800"}', "row 3 is no JSON in UTF-8"),
        ('{"text": ' + "[" * 100_000, "row 3 is no JSON"),
    ],
    ids=["cut", "other field", "null", "number", "list", "lone surrogate", "deep"],
)
def test_a_broken_row_is_named_with_its_file(tmp_path: Path, row: Any, words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, "", row, {"text": "good"}])
    with pytest.raises(DataError, match=f"a.jsonl {words}"):
        file_corpus([str(path)], "text")


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table(columns), path)
    return path


def test_rows_of_parquet_are_documents_in_the_named_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=TEXTS, n=list(range(64)))
    assert all_texts(file_corpus([str(path)], "body")) == set(TEXTS)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"body": ["x"]}, "has no column 'text'; it has body"),
        ({"text": ["x", None, "y"]}, "row 2 has no text in 'text', but NoneType"),
        ({"text": [1, 2]}, "row 1 has no text in 'text', but int"),
    ],
    ids=["other column", "null", "numbers"],
)
def test_a_broken_parquet_file_is_named_with_its_row(tmp_path: Path, columns: dict[str, list[Any]], words: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=f"a.parquet {words}"):
        file_corpus([str(path)], "text")


def test_a_file_that_only_says_it_is_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"a.parquet is no readable Parquet file"):
        file_corpus([str(tmp_path / "a.parquet")], "text")


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match="pip install 'optkit\\[hub\\]'") as caught:
        file_corpus([str(tmp_path / "a.parquet")], "text")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["a.xls", "a.bin", "a.jsonl.gz"])
def test_other_files_are_refused_by_their_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"files that end in .* are not read; use .txt"):
        file_corpus([str(tmp_path / name)], "text")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text: byte 5 is 0xff"):
        file_corpus([str(tmp_path / "a.txt")], "text")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{folder}/*.txt", "matches no file"),
        ("{folder}/missing.txt", "matches no file"),
        ("{folder}", "is a folder; name the files, such as"),
        ("", "is a folder"),
        ("x" * 5000, "is no file and no pattern"),
        ("~no-such-user/x.txt", "is no file and no pattern"),
        ("{folder}/a**b", "is no file and no pattern|matches no file"),
        ("a\0b", "is no file and no pattern|matches no file"),
    ],
    ids=["pattern", "file", "folder", "nothing", "long", "no user", "stars", "zero byte"],
)
def test_a_place_without_files_is_refused(tmp_path: Path, pattern: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        file_corpus([pattern.format(folder=tmp_path)], "text")


class Rows(list[dict[str, str]]):
    """As much of a data set as is read."""

    column_names = ("body",)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[str]]], list[Any]]:
    def install(splits: dict[str, list[str]]) -> list[Any]:
        asked: list[Any] = []

        def load_dataset(name: str, subset: str | None, split: str) -> Rows:
            asked.append((name, subset, split))
            key = split.partition("[")[0]
            if key not in splits:
                raise ValueError(f"Unknown split {key!r}\nand more")
            return Rows({"body": text} for text in splits[key])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return install


def test_a_data_set_of_the_hub_is_evaluated_on_its_split_and_calibrated_on_train(fake_hub: Callable[..., list[Any]]) -> None:
    asked = fake_hub({"train": ["a", "shared", ""], "test": ["shared", "b", ""]})
    corpus = hub_corpus("owner/name", "sub", "test", "body")
    assert (corpus.calibration, corpus.evaluation) == (("a",), ("shared", "b"))
    assert {(name, subset) for name, subset, _ in asked} == {("owner/name", "sub")}


def test_a_data_set_evaluated_on_its_training_split_shares_nothing(fake_hub: Callable[..., list[Any]]) -> None:
    fake_hub({"train": TEXTS})
    corpus = hub_corpus("owner/name", None, "train", "body")
    assert not set(corpus.calibration) & set(corpus.evaluation)


def test_a_data_set_that_cannot_be_used_is_refused(fake_hub: Callable[..., list[Any]]) -> None:
    fake_hub({"train": ["a"], "test": ["b"], "void": [""]})
    with pytest.raises(DataError, match=r"has no column 'text'; it has body"):
        hub_corpus("owner/name", None, "test", "text")
    with pytest.raises(MissingError, match=r"data set 'owner/name' cannot be loaded: Unknown split 'dev'$"):
        hub_corpus("owner/name", None, "dev", "body")
    with pytest.raises(DataError, match=r"corpus 'owner/name' is empty"):
        hub_corpus("owner/name", None, "void", "body")


def test_the_hub_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingError, match="pip install 'optkit\\[hub\\]'"):
        hub_corpus("owner/name", None, "test", "text")


def test_the_python_corpus_shares_no_text_and_is_the_same_again() -> None:
    corpus = python_corpus()
    assert not set(corpus.calibration) & set(corpus.evaluation)
    assert len(corpus.calibration) >= 32
    assert len(corpus.evaluation) >= 40
    assert all(text.strip() for text in corpus.calibration)
    assert python_corpus().sha256 == corpus.sha256


def test_a_python_without_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optkit.data.python_sources.standard_library", lambda part: [])
    with pytest.raises(DataError, match=r"has no sources of its standard library; name text files"):
        python_corpus()
