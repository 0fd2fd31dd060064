"""Documents from files and from the Hub, and their split into calibration and evaluation. The same text never stands on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optkit.core.errors import DataError
from optkit.data import python_sources, tables
from optkit.data.hub import load_split, refuse_missing

_CALIBRATION_SHARE = 8  # one document of eight
_PLAIN = {".txt", ".md", ".py", ".rst", ""}


@dataclass(frozen=True)
class Corpus:
    """Texts for calibration and for evaluation; ``sha256`` covers the evaluation texts."""

    name: str
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The digest of the evaluation texts, in order."""
        whole = hashlib.sha256()
        for text in self.evaluation:
            whole.update(hashlib.sha256(text.encode()).digest())
        return whole.hexdigest()


def python_corpus(calibration_files: int = 64) -> Corpus:
    """Return the held-out standard library of this interpreter, and some of the rest of it for calibration.

    Raises:
        DataError: this interpreter came without the sources of its library.
    """
    evaluation = [text for path in python_sources.standard_library("eval") if (text := python_sources.read_source(path))]
    training = [path for path in python_sources.standard_library("train") if path.stat().st_size > 4096]
    step = max(1, len(training) // calibration_files)
    known = set(evaluation)
    calibration = [text for path in training[::step] if (text := python_sources.read_source(path)) and text not in known]
    if not evaluation or not calibration:
        raise DataError(
            "this Python has no sources of its standard library; name text files: task: {language-modeling: {corpus: {files: [...]}}}"
        )
    return Corpus("python", tuple(calibration), tuple(evaluation))


def file_corpus(patterns: Sequence[str], column: str) -> Corpus:
    """Return the documents of text, CSV, JSONL and Parquet files.

    Raises:
        DataError: a pattern matches no file, a row is broken (file and row are named), or there is no text.
    """
    texts = [text for path in files_of(patterns) for text in texts_of(path, column)]
    return split(", ".join(Path(pattern).name for pattern in patterns), texts)


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and patterns name, relative to the current folder.

    Raises:
        DataError: a pattern matches no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        paths = _expand(pattern)
        if not paths:
            raise DataError(f"corpus: {pattern!r} matches no file (from {Path.cwd().name}/, the current folder)")
        found.extend(paths)
    return found


def hub_corpus(name: str, subset: str | None, evaluation_split: str, column: str) -> Corpus:
    """Return a data set of the Hub: its own splits, ``train`` for calibration.

    Raises:
        MissingError: the package ``datasets`` is not installed, or the Hub cannot be reached.
        DataError: there is no such column, or no text.
    """
    sides = [load_split(name, subset, part) for part in ("train[:512]", evaluation_split)]
    refuse_missing(name, sides[1], [column])
    evaluation = [text for text in sides[1][column] if text]
    known = set(evaluation)
    calibration = [text for text in sides[0][column] if text and text not in known]
    return _filled(Corpus(name, tuple(calibration), tuple(evaluation)))


def split(name: str, texts: Iterable[str]) -> Corpus:
    """Split documents by a hash of their content: an eighth for calibration. A few long documents are cut instead, each at an eighth."""
    documents = [text for text in dict.fromkeys(texts) if text.strip()]
    if len(documents) >= 4 * _CALIBRATION_SHARE:
        buckets = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _CALIBRATION_SHARE for text in documents]
        calibration = [text for text, bucket in zip(documents, buckets, strict=True) if bucket == 0]
        evaluation = [text for text, bucket in zip(documents, buckets, strict=True) if bucket]
    else:
        cuts = [len(text) // _CALIBRATION_SHARE for text in documents]
        calibration = [text[:cut] for text, cut in zip(documents, cuts, strict=True) if cut]
        evaluation = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
        calibration = [text for text in calibration if text not in set(evaluation)]
    return _filled(Corpus(name, tuple(calibration), tuple(evaluation)))


def _filled(corpus: Corpus) -> Corpus:
    if not corpus.evaluation:
        raise DataError(f"corpus {corpus.name!r} is empty: there is no text to evaluate")
    return corpus


def _expand(pattern: str) -> list[Path]:
    try:
        path = Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            raise DataError(f"corpus: {pattern!r} is a folder; name the files, such as '{pattern.rstrip('/')}/*.txt'")
        root = Path(path.anchor) if path.is_absolute() else Path()
        return sorted(found for found in root.glob(str(path.relative_to(path.anchor))) if found.is_file())
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, '**' within a word, an unknown '~user'
        raise DataError(f"corpus: {pattern!r} is no file and no pattern: {error}") from None


def texts_of(path: Path, column: str) -> list[str]:
    """Return the texts of a file: of a table those in a column, of any other the whole.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        if path.suffix in tables.SUFFIXES:
            return [row.text(column) for row in tables.rows(path, [column])]
        if path.suffix in _PLAIN:
            return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    raise DataError(f"{path}: files that end in {path.suffix!r} are not read; use .txt, .md, .py, .csv, .jsonl or .parquet")
