"""Files of the Stanford Question Answering Dataset, versions 1.1 and 2.0: articles of paragraphs of questions with answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.core.errors import DataError
from optkit.data.reading import text_of
from optkit.data.tables import Row


@dataclass(frozen=True)
class Question:
    """A question with the text that answers it, the answers that are right, each once, where the first stands there, and its place."""

    where: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int

    @classmethod
    def of(cls, row: Row) -> Question:
        """Return the question of a row with columns question, context and answers, as the Hub has them.

        Raises:
            DataError: a column is something else.
        """
        answers = row.values.get("answers")
        texts, starts = (answers.get(key) if isinstance(answers, Mapping) else None for key in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{row.where} has no answers with their 'text' and 'answer_start', but {type(answers).__name__}")
        return cls(row.where, row.text("question"), row.text("context"), tuple(dict.fromkeys(texts)), starts[0] if starts else -1)


def squad_questions(path: Path) -> list[Question]:
    """Return the questions of a file; those that the text does not answer have no answers.

    Raises:
        DataError: it cannot be read, is no JSON, or has not the form of SQuAD; the place in it is told.
    """
    try:
        whole = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    return list(_questions(path, whole))


def _questions(path: Path, whole: Any) -> Iterator[Question]:
    for a, article in enumerate(_list(whole, "data", str(path))):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path} data[{a}]")):
            place = f"{path} data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", place)
            for q, asked in enumerate(_list(paragraph, "qas", place)):
                where = f"{place}.qas[{q}]"
                answers = _list(asked, "answers", where)
                texts = tuple(dict.fromkeys(_text(answer, "text", where) for answer in answers))
                start = answers[0].get("answer_start", -1) if answers else -1
                if answers and (not isinstance(start, int) or context[start : start + len(texts[0])] != texts[0]):
                    raise DataError(f"{where}: its answer {texts[0][:40]!r} does not stand at {start!r} of its context")
                yield Question(where, _text(asked, "question", where), context, texts, start)


def _list(holder: Any, key: str, where: str) -> list[Any]:
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where} has no list {key!r}, as SQuAD files have")
    return found


def _text(holder: Any, key: str, where: str) -> str:
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, str):
        raise DataError(f"{where} has no text {key!r}, as SQuAD files have")
    return found
