"""What tasks share that answer one text by another: pairs of texts, greedy answers, and how near these come to the right ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Kind, Subject
from optkit.data import tables
from optkit.data.documents import files_of
from optkit.data.hub import hub_rows
from optkit.data.sides import Asked, Side, Sides, parted
from optkit.tasks.contract import DataCard
from optkit.tasks.supervised import Examples, Supervised

Length = Annotated[int, Field(ge=1, le=100_000)]
_IGNORED = -100  # of tokens after the end of an answer: PyTorch's cross entropy passes over it


class PairFiles(Settings):
    """CSV, JSONL or Parquet files with a text and its answer in each row."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or patterns; .csv, .jsonl, .parquet")
    source: str = Field(default="source", description="column with the text")
    target: str = Field(default="target", description="column with the answer")


class PairHub(Settings):
    """A data set of the Hub with a text and its answer in each row."""

    hub: str = Field(description="data set name, owner/name")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", description="split that is read, and parted here")
    source: str = Field(default="source", description="column with the text")
    target: str = Field(default="target", description="column with the answer")
    items: Annotated[int, Field(ge=16)] = Field(default=20_000, description="rows that are read, at most")


class Answering(Supervised):
    """A task that answers a text by a text. Answers are generated greedily."""

    kinds: ClassVar[tuple[Kind, ...]] = ("seq2seq-lm",)
    only_judging: ClassVar[frozenset[str]] = frozenset({"items"})
    prefix: str = Field(default="", max_length=1000, description="what the model is told before each text, as it was trained to be")
    text_tokens: Length = Field(default=64, description="tokens of a text, at most")
    answer_tokens: Length = Field(default=32, description="tokens of an answer, at most")
    items: Annotated[int, Field(ge=1)] = Field(default=1000, description="items that are evaluated, at most, evenly spread over all")

    @abstractmethod
    def read(self) -> Sides[Asked]:
        """Return the texts with their answers."""

    @abstractmethod
    def scores(self, given: str, item: Asked) -> dict[str, Any]:
        """Return numbers, or rows of them, that say how near an answer comes."""

    @abstractmethod
    def trivially(self, item: Asked) -> str:
        """Return an answer that takes no model."""

    @property
    def item_positions(self) -> int:
        """The positions of a text, at most."""
        return self.text_tokens

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the number of token ids, the one that ends an answer, and the longest text."""
        positions = max(self.text_tokens, self.answer_tokens)
        return {"per": "answer", "vocabulary": len(tokenizer), "end": tokenizer.eos_token_id, "positions": positions}

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return token ids of the texts with their mask, those of the first right answer as ``labels``, and numbers of items (items,)."""
        rows = self._rows(side)
        items = [self.sides.of(side)[row] for row in rows]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts = [self.prefix + item.whole for item in items]
        found = tokenizer(texts, padding="longest", truncation=True, max_length=self.text_tokens, return_tensors="pt")
        labels = torch.full((len(items), self.answer_tokens), _IGNORED)
        for row, ids in enumerate(tokenizer(text_target=[item.answers[0] for item in items])["input_ids"]):
            whole = (ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])[: self.answer_tokens]
            labels[row, : len(whole)] = torch.tensor(whole)
        width = int((labels != _IGNORED).sum(1).max())
        inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
        return Examples({**inputs, "labels": labels[:, :width].contiguous()}, torch.tensor(rows))

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the cross entropy of the right answer's tokens, as the model computes it."""
        found: Tensor = output.loss
        return found

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return how well the right answer is predicted, and what is made of the answer that is given."""
        labels = inputs["labels"]
        logits = engine.forward(inputs).logits.float()
        counted = labels != _IGNORED
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none")
        tokens = self._generated(engine, inputs, subject.tokenizer.eos_token_id)
        texts = subject.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {
            "nats": nats.view_as(labels).sum(1),
            "tokens": counted.sum(1),
            "hits": ((logits.argmax(-1) == labels) & counted).sum(1),
            "answer": tokens,
            **self.judge(texts, answers),
        }

    def judge(self, output: Any, answers: Tensor) -> dict[str, Tensor]:
        """Return the columns of ``scores`` for given texts and the numbers of their items."""
        rows = [self.scores(text.strip(), self.sides.evaluation[int(row)]) for text, row in zip(output, answers, strict=True)]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return the columns of the answers that take no model."""
        rows = self._rows("evaluation")
        columns = self.judge([self.trivially(self.sides.evaluation[row]) for row in rows], torch.tensor(rows))
        return (type(self).trivially.__doc__ or "").partition("\n")[0].removeprefix("Return ").rstrip("."), {
            name: column.numpy() for name, column in columns.items()
        }

    def card(self, subject: Subject) -> DataCard:
        """Describe the evaluated items."""
        return replace(super().card(subject), items=len(self._rows("evaluation")))

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        """Return texts without their answers."""
        return {name: tensor for name, tensor in super().batch(subject, size).items() if name != "labels"}

    def _rows(self, side: Side) -> list[int]:
        """Return the numbers of a side's items that count; all but in evaluation."""
        count = len(self.sides.of(side))
        return (
            np.linspace(0, count - 1, min(count, self.items)).round().astype(int).tolist() if side == "evaluation" else list(range(count))
        )

    def _generated(self, engine: Any, inputs: Mapping[str, Tensor], end: int) -> Tensor:
        """Return (b, answer_tokens) greedy tokens; from the end of an answer on, its end."""
        begun = engine.first({name: tensor for name, tensor in inputs.items() if name != "labels"}).cpu()
        found, ended = [begun], begun == end
        for tokens in engine.further(begun, self.answer_tokens - 1):
            found.append(torch.where(ended, end, tokens.cpu()))
            ended |= found[-1] == end
            if ended.all():
                break
        engine.reset()
        whole = torch.full((len(ended), self.answer_tokens), end)
        whole[:, : len(found)] = torch.stack(found, 1)
        return whole


def predictions() -> tuple[Metric, Metric, Metric]:
    """Return the metrics of how well right answers are predicted, and of how many answers are the baseline's, to the last token."""
    return (
        Metric(
            "perplexity", "", False, lambda c: np.exp(c["nats"].sum(-1) / c["tokens"].sum(-1)), lambda c: np.exp(c["nats"] / c["tokens"])
        ),
        Metric("token_accuracy", "share", True, lambda c: c["hits"].sum(-1) / c["tokens"].sum(-1), lambda c: c["hits"] / c["tokens"]),
        Metric(
            "agreement", "share", True, lambda c: (c["same"] == 1).mean(-1), lambda c: (c["same"] == 1).astype(np.float64), relative=True
        ),
    )


def mean_of(name: str, unit: str = "share", better: bool = True) -> Metric:
    """Return the metric that is the mean of a column over all items."""
    return Metric(name, unit, better, lambda c: c[name].mean(-1), lambda c: c[name])


def pairs_of(corpus: PairFiles | PairHub) -> Sides[Asked]:
    """Return the pairs of files or of a data set of the Hub; equal texts stand on one side.

    Raises:
        DataError: a row is broken, or one of its texts is empty; file and row are named.
        MissingError: the package ``datasets`` is not installed, or the Hub cannot be reached.
    """
    columns = (corpus.source, corpus.target)
    if isinstance(corpus, PairHub):
        name, rows = corpus.hub, hub_rows(corpus.hub, corpus.subset, corpus.split, columns, corpus.items)
    else:
        paths = files_of(corpus.files)
        name, rows = ", ".join(path.name for path in paths), [row for path in paths for row in tables.rows(path, columns)]
    return asked(name, [(row.where, row.text(columns[0]), (row.text(columns[1]),)) for row in rows])


def asked(name: str, found: Sequence[tuple[str, str, tuple[str, ...]]]) -> Sides[Asked]:
    """Part texts with their answers, each told with its place; equal texts stand on one side.

    Raises:
        DataError: a text or an answer is empty, or there are too few.
    """
    for where, text, answers in found:
        if not text.strip() or not answers or not all(answer.strip() for answer in answers):
            raise DataError(f"{where} has an empty {'answer' if text.strip() else 'text'}")
    return parted(name, [(text, Asked(text, answers)) for _, text, answers in found])
