"""Questions that a text answers, by words of its own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from optkit.core.errors import DataError
from optkit.core.measurement import Metric
from optkit.core.settings import Settings
from optkit.data.documents import files_of
from optkit.data.hub import hub_rows
from optkit.data.sides import Asked, Sides
from optkit.data.signatures import questions_on_signatures
from optkit.data.squad import Question, squad_questions
from optkit.tasks.answering import Answering, Length, asked, mean_of, predictions


class SquadFiles(Settings):
    """Files in the format of SQuAD 1.1 and 2.0."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or patterns of .json files")


class SquadHub(Settings):
    """A data set of the Hub in the form of rajpurkar/squad: columns question, context and answers."""

    hub: str = Field(description="data set name, owner/name")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", description="split that is read, and parted here")
    items: int = Field(default=20_000, ge=16, description="rows that are read, at most")


class QuestionAnswering(Answering):
    """F1 of words and exact matches, by the rules of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), as torchmetrics has them."""

    corpus: Literal["signatures"] | SquadFiles | SquadHub = Field(
        default="signatures", description="'signatures' are questions on those of the standard library's functions"
    )
    text_tokens: Length = Field(default=96, description="tokens of question and text, at most")

    def read(self) -> Sides[Asked]:
        """Return the questions, each with its text, and the answers."""
        if isinstance(self.corpus, str):
            return questions_on_signatures()
        if isinstance(self.corpus, SquadFiles):
            paths = files_of(self.corpus.files)
            name, found = ", ".join(path.name for path in paths), [item for path in paths for item in squad_questions(path)]
        else:
            name = self.corpus.hub
            rows = hub_rows(name, self.corpus.subset, self.corpus.split, ("question", "context", "answers"), self.corpus.items)
            found = [Question.of(row) for row in rows]
        answered = [item for item in found if item.answers]
        if not answered:
            raise DataError(f"corpus {name!r} has no question with an answer")
        return asked(name, [(item.where, item.text, item.answers) for item in answered])

    def scores(self, given: str, item: Asked) -> dict[str, Any]:
        """Return F1 and exact match against the nearest of the right answers."""
        from torchmetrics.functional.text import squad

        answers = {"answer_start": [0] * len(item.answers), "text": list(item.answers)}
        found = squad({"prediction_text": given, "id": "0"}, {"answers": answers, "id": "0"})
        return {"f1": float(found["f1"]) / 100, "exact_match": float(found["exact_match"]) / 100}

    def trivially(self, item: Asked) -> str:
        """Return the last word of the text."""
        return item.text.split()[-1]

    def metrics(self) -> tuple[Metric, ...]:
        """Return F1 first."""
        return (mean_of("f1"), mean_of("exact_match"), *predictions())
