"""Questions that a text answers, by words of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.measurement import Metric
from optkit.core.settings import Settings
from optkit.core.subject import Kind, Subject
from optkit.data.documents import files_of
from optkit.data.hub import hub_rows
from optkit.data.sides import Asked, Side, Sides, parted
from optkit.data.signatures import questions_on_signatures
from optkit.data.squad import Question, squad_questions
from optkit.tasks.answering import Answering, Length, mean_of, predictions
from optkit.tasks.spans import span_examples, span_loss, spans
from optkit.tasks.supervised import Examples


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
    """F1 of words and exact matches, by the rules of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), as torchmetrics has them.

    An encoder marks the answer in the text (extract); a model with encoder and decoder writes it (write).
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("module", "seq2seq-lm")
    form: Literal["extract", "write"] = Field(default="extract", description="whether the answer is marked in the text, or written")

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
        for item in answered:
            if not item.question.strip() or not item.context.strip():
                raise DataError(f"{item.where} has an empty question or context")
        items = [Asked(item.question, item.answers, item.context, item.start) for item in answered]
        return parted(name, [(item.context, item) for item in items])

    @property
    def _extracts(self) -> bool:
        return self.form == "extract"

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return what an encoder that marks pieces must have, or a model that writes."""
        if not self._extracts:
            return super().needs(tokenizer)
        return {"per": "span", "vocabulary": len(tokenizer), "positions": self.text_tokens}

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return questions with their texts, and where the answers stand in them, or the answers themselves."""
        if not self._extracts:
            return super().examples(side, tokenizer)
        rows = self._rows(side)
        found = span_examples([self.sides.of(side)[row] for row in rows], tokenizer, self.text_tokens)
        return Examples(found.inputs, torch.cat([found.answers, torch.tensor(rows)[:, None]], 1))

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the cross entropy of the ends of the piece, or of the answer's tokens."""
        return span_loss(output, answers[:, :2]) if self._extracts else super().loss(output, answers)

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return what is made of the answers that are given."""
        if not self._extracts:
            return super().judged(subject, engine, inputs, answers)
        if subject.kind != "module":
            raise DataError(f"model {subject.source!r} writes its answers; tell the task so: form: write")
        output = engine.forward(inputs)
        items = [self.sides.evaluation[int(row)] for row in answers[:, 2]]
        texts, ends = spans(output, items, subject.tokenizer, self.text_tokens, self.answer_tokens)
        counted = answers[:, 0] >= 0
        logits = torch.stack([output.start_logits, output.end_logits], 1).float()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers[:, :2].flatten(), ignore_index=-100, reduction="none")
        hits = (ends == answers[:, :2]).sum(1)
        told = {"nats": nats.view(-1, 2).sum(1), "tokens": counted * 2, "hits": hits, "answer": ends}
        return told | self.judge(texts, answers[:, 2])

    def scores(self, given: str, item: Asked) -> dict[str, Any]:
        """Return F1 and exact match against the nearest of the right answers."""
        from torchmetrics.functional.text import squad

        answers = {"answer_start": [0] * len(item.answers), "text": list(item.answers)}
        found = squad({"prediction_text": given, "id": "0"}, {"answers": answers, "id": "0"})
        return {"f1": float(found["f1"]) / 100, "exact_match": float(found["exact_match"]) / 100}

    def trivially(self, item: Asked) -> str:
        """Return the last word of the text."""
        return item.whole.split()[-1]

    def metrics(self) -> tuple[Metric, ...]:
        """Return F1 first."""
        return (mean_of("f1"), mean_of("exact_match"), *predictions())
