"""Which of some classes a text belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from optkit.core.errors import DataError
from optkit.core.measurement import Array, Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Subject
from optkit.data import tables
from optkit.data.docstrings import by_package
from optkit.data.documents import files_of
from optkit.data.hub import hub_rows
from optkit.data.sides import SIDES, Labelled, Side, Sides, parted
from optkit.tasks.classes import Score, counts, f1, precision, recall
from optkit.tasks.contract import DataCard
from optkit.tasks.naming import places_of
from optkit.tasks.supervised import Examples, Supervised, logits_of
from optkit.tasks.windows import windows_of

Length = Annotated[int, Field(ge=4, le=100_000)]
_MOST_NAMED = 12  # classes, for which each has a metric of its own


class LabelledFiles(Settings):
    """CSV, JSONL or Parquet files."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or patterns; .csv, .jsonl, .parquet")
    text: str = Field(default="text", description="column with the text")
    label: str = Field(default="label", description="column with the class")


class LabelledHub(Settings):
    """A data set of the Hub, such as stanfordnlp/imdb, nyu-mll/glue or fancyzhx/ag_news."""

    hub: str = Field(description="data set name, owner/name")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", description="split that is read, and parted here")
    text: str = Field(default="text", description="column with the text")
    label: str = Field(default="label", description="column with the class")
    items: Annotated[int, Field(ge=16)] = Field(default=20_000, description="rows that are read, at most")


class TextClassification(Supervised):
    """Accuracy, precision, recall and F1 of a text's class; macro: all classes count alike."""

    only_judging: ClassVar[frozenset[str]] = frozenset({"called", "stride"})
    corpus: Literal["docstrings"] | LabelledFiles | LabelledHub = Field(
        default="docstrings", description="'docstrings' are those of the standard library, by package"
    )
    length: Length = Field(default=64, description="tokens of a text, at most")
    stride: Length | None = Field(
        default=None,
        description="tokens from one window of a longer text to the next; its answer is the mean over all. Default: the first window's",
    )
    called: Mapping[str, str] = Field(default_factory=dict, description="the model's name for a class, where it has another")

    def read(self) -> Sides[Labelled]:
        """Return the texts with their classes."""
        if self.corpus == "docstrings":
            return by_package()
        if isinstance(self.corpus, LabelledHub):
            name, columns = self.corpus.hub, (self.corpus.text, self.corpus.label)
            rows = hub_rows(name, self.corpus.subset, self.corpus.split, columns, self.corpus.items)
        else:
            name, columns = ", ".join(Path(pattern).name for pattern in self.corpus.files), (self.corpus.text, self.corpus.label)
            rows = [row for path in files_of(self.corpus.files) for row in tables.rows(path, columns)]
        items = [Labelled(row.text(columns[0]), row.label(columns[1])) for row in rows]
        empty = next((row for row, item in zip(rows, items, strict=True) if not item.text.strip()), None)
        if empty is not None:
            raise DataError(f"{empty.where} has an empty text in {columns[0]!r}")
        if len({item.label for item in items}) < 2:
            raise DataError(f"corpus {name!r} knows {len({item.label for item in items})} class; a classifier needs two at least")
        return parted(name, [(item.text, item) for item in items])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The classes of all sides, sorted: one that training never shows is answered wrongly, and counts."""
        return tuple(sorted({item.label for side in SIDES for item in self.sides.of(side)}))

    @property
    def item_positions(self) -> int:
        """The positions of a text."""
        return self.length

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the number of token ids and of classes, and the longest text."""
        return {"per": "item", "vocabulary": len(tokenizer), "labels": list(self.labels), "positions": self.length}

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return token ids (items, length) with their mask, and class numbers (items,); in windows, (items, windows, length)."""
        items = self.sides.of(side)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts, answers = [item.text for item in items], torch.tensor([self.labels.index(item.label) for item in items])
        if self.stride is not None and side == "evaluation":
            return Examples(windows_of(texts, tokenizer, self.length, self.stride), answers)
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return Examples({name: found[name] for name in ("input_ids", "attention_mask")}, answers)

    def card(self, subject: Subject) -> DataCard:
        """Describe the evaluated items, and how many are longer than what is read of them."""
        found = super().card(subject)
        texts = [item.text for item in self.sides.evaluation]
        longer = sum(len(ids) > self.length for ids in subject.tokenizer(texts)["input_ids"])
        told = {"in_windows" if self.stride is not None else "cut_short": longer} if longer else {}
        return replace(found, detail={**found.detail, **told})

    def batch(self, subject: Subject, size: int) -> Mapping[str, Tensor]:
        """Return the inputs of evaluated items; of longer texts the first window."""
        return {name: tensor if tensor.ndim == 2 else tensor[:, 0] for name, tensor in super().batch(subject, size).items()}

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return the columns of ``judge`` for a batch, the model's classes in the order of the data's."""
        logits = logits_of(engine.forward(inputs)) if inputs["input_ids"].ndim == 2 else _mean_over_windows(engine, inputs)
        places = places_of(self.labels, subject, self.called)
        return self.judge(logits if places is None else logits[..., places], answers)

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the cross entropy."""
        return functional.cross_entropy(logits_of(output).float(), answers)

    def judge(self, output: Any, answers: Tensor) -> dict[str, Tensor]:
        """Return the class that was given and the right one."""
        return {"answer": logits_of(output).argmax(-1), "right": answers}

    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return the most frequent class of the training texts, for every text."""
        most = Counter(item.label for item in self.sides.training).most_common(1)[0][0]
        right = self.examples("evaluation", tokenizer).answers.double().numpy()
        return f"always {most!r}", {"answer": np.full(len(right), float(self.labels.index(most))), "right": right}

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy first; then the means over the classes, the F1 of each class, and the agreement with the baseline."""
        each = [
            _by_class(f"f1_{_slug(name)}", f1, len(self.labels), number)
            for number, name in enumerate(self.labels)
            if len(self.labels) <= _MOST_NAMED
        ]
        return (
            Metric("accuracy", "share", True, lambda c: _right(c).mean(-1), _right),
            _by_class("precision", precision, len(self.labels)),
            _by_class("recall", recall, len(self.labels)),
            _by_class("f1", f1, len(self.labels)),
            *each,
            Metric("agreement", "share", True, lambda c: c["same"].mean(-1), lambda c: c["same"], relative=True),
        )


def _mean_over_windows(engine: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the logits (items, classes) over the windows of each text; those that only fill up have no part in it."""
    there = inputs["attention_mask"].any(-1)  # (items, windows)
    rows = {name: tensor[there] for name, tensor in inputs.items()}
    pieces = zip(*(tensor.split(len(there)) for tensor in rows.values()), strict=True)
    logits = torch.cat([logits_of(engine.forward(dict(zip(rows, piece, strict=True)))).float() for piece in pieces])
    sums = logits.new_zeros(len(there), logits.shape[1]).index_add(0, there.nonzero()[:, 0], logits)
    return sums / there.sum(1, keepdim=True)


def _right(columns: Samples) -> Array:
    return np.asarray(columns["answer"] == columns["right"], dtype=np.float64)


def _by_class(name: str, score: Score, classes: int, one: int | None = None) -> Metric:
    """Return a metric that is the mean of a score over all classes, or that of one class."""

    def estimate(columns: Samples) -> Array:
        found = score(counts(columns["right"], columns["answer"], classes))
        kept: Array = found.mean(-1) if one is None else found[..., one]
        return kept

    return Metric(name, "share", True, estimate, _right)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())
