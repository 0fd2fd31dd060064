"""Which source files are held out."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from optkit.data import python_sources
from optkit.data.python_sources import is_held_out, is_test, standard_library, without_copies

ROOT = Path(sysconfig.get_paths()["stdlib"])
CODE = "\n".join(f"value_number_{number} = compute_something({number})" for number in range(40))


def test_no_held_out_file_is_ever_in_the_training_list() -> None:
    train, held_out = standard_library("train"), standard_library("eval")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert not any(is_held_out(path.relative_to(ROOT)) for path in train)
    assert all(is_held_out(path.relative_to(ROOT)) for path in held_out)


def test_about_an_eighth_is_held_out() -> None:
    train = [path for path in standard_library("train") if not is_test(path.relative_to(ROOT))]
    assert 0.07 < len(standard_library("eval")) / (len(train) + len(standard_library("eval"))) < 0.18


def test_the_split_depends_on_the_name_alone() -> None:
    drawn = [Path(f"package/module_{number}.py") for number in range(800)]
    held_out = [path for path in drawn if is_held_out(path)]
    assert 70 < len(held_out) < 130
    assert is_held_out(Path("json/scanner.py")) is is_held_out(Path("json") / "scanner.py")


def test_evaluation_has_no_tests_no_tables_and_nothing_installed() -> None:
    for path in standard_library("eval"):
        parts = path.relative_to(ROOT).parts
        assert not is_test(Path(*parts))
        assert not {"encodings", "pydoc_data", "site-packages", "dist-packages"} & set(parts)


def test_installed_packages_are_listed_without_our_own() -> None:
    found = python_sources.installed_packages()
    assert any("numpy" in path.parts for path in found)
    assert not any("optkit" in path.parts[-3:] and "site-packages" in path.parts for path in found)


def test_copies_of_held_out_files_are_left_out(tmp_path: Path) -> None:
    names = {
        "held_out": CODE,
        "copy": "# vendored\n" + CODE,
        "indented": CODE.replace("\n", "\n    "),
        "own": CODE.replace("compute", "read"),
    }
    paths = {name: tmp_path / f"{name}.py" for name in names}
    for name, text in names.items():
        paths[name].write_text(text)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    kept = dict(without_copies([*paths.values(), tmp_path / "binary.py"], [paths["held_out"]]))
    assert set(kept) == {paths["own"]}


def test_a_file_that_is_no_text_is_read_as_empty(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    assert python_sources.read_source(tmp_path / "latin.py") == ""
    assert python_sources.read_source(tmp_path / "missing.py") == ""
