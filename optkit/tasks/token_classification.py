"""Which class each word of a line belongs to, judged by whole entities: a tag begun by B- goes on with I- of the same name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from optkit.core.errors import DataError
from optkit.core.measurement import Array, Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Subject
from optkit.data.columns import read_columns
from optkit.data.documents import files_of
from optkit.data.python_tokens import by_lexical_class
from optkit.data.sides import SIDES, Side, Sides, Tagged, parted
from optkit.tasks.classes import Counts, Score, f1, precision, recall
from optkit.tasks.naming import places_of
from optkit.tasks.supervised import Examples, Supervised, logits_of

_IGNORED = -100  # of pieces that do not begin a word: PyTorch's cross entropy passes over it
_MOST_NAMED = 12


class ColumnFiles(Settings):
    """Files of one word a line, as CoNLL-2003 has them."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or patterns")
    word: int = Field(default=0, description="position of the word in a line")
    tag: int = Field(default=-1, description="position of the tag; negative: from the end")


class TokenClassification(Supervised):
    """Precision, recall and F1 of entities (Tjong Kim Sang and De Meulder 2003, https://aclanthology.org/W03-0419), in all and by kind."""

    only_judging: ClassVar[frozenset[str]] = frozenset({"called"})
    corpus: Literal["python"] | ColumnFiles = Field(
        default="python", description="'python' are lines of the standard library by lexical class"
    )
    length: Annotated[int, Field(ge=4, le=100_000)] = Field(default=64, description="tokens of a line, at most")
    called: Mapping[str, str] = Field(default_factory=dict, description="the model's name for a tag, where it has another")

    def read(self) -> Sides[Tagged]:
        """Return the lines with their tags."""
        if isinstance(self.corpus, str):
            return by_lexical_class()
        paths = files_of(self.corpus.files)
        found = [item for path in paths for item in read_columns(path, self.corpus.word, self.corpus.tag)]
        name = ", ".join(path.name for path in paths)
        if len({tag for item in found for tag in item.tags}) < 2:
            raise DataError(f"corpus {name!r} has fewer than two tags; there is nothing to tell apart")
        return parted(name, [(" ".join(item.words), item) for item in found])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The tags of all sides, sorted: one that training never shows is answered wrongly, and counts."""
        return tuple(sorted({tag for side in SIDES for item in self.sides.of(side) for tag in item.tags}))

    @cached_property
    def entity_kinds(self) -> tuple[str, ...]:
        """The kinds of entities, sorted."""
        return tuple(sorted({_kind(label) for label in self.labels if label != "O"}))

    @property
    def item_positions(self) -> int:
        """The positions of a line."""
        return self.length

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the number of token ids and of tags, and the longest line."""
        return {"per": "token", "vocabulary": len(tokenizer), "labels": list(self.labels), "positions": self.length}

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return token ids (items, length) with their mask, and the tag of each word at its first piece (items, length)."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        begin, end = ([one] if one is not None else [] for one in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        padding = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
        ids, mask, answers = (torch.full((len(self.sides.of(side)), self.length), fill) for fill in (padding, 0, _IGNORED))
        for row, item in enumerate(self.sides.of(side)):
            words = [f" {word}" if number else word for number, word in enumerate(item.words)]
            pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
            place = len(begin)
            ids[row, :place] = torch.tensor(begin, dtype=torch.long)
            for piece, tag in zip(pieces, item.tags, strict=True):
                if place + len(piece) + len(end) > self.length or not piece:
                    break
                ids[row, place : place + len(piece)] = torch.tensor(piece)
                answers[row, place] = numbers[tag]
                place += len(piece)
            ids[row, place : place + len(end)] = torch.tensor(end, dtype=torch.long)
            mask[row, : place + len(end)] = 1
        return Examples({"input_ids": ids, "attention_mask": mask}, answers)

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return the columns of ``judge`` for a batch, the model's classes in the order of the data's."""
        logits = logits_of(engine.forward(inputs))
        places = places_of(self.labels, subject, self.called)
        return self.judge(logits if places is None else logits[..., places], answers)

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the cross entropy of the words."""
        return functional.cross_entropy(logits_of(output).float().flatten(0, 1), answers.flatten(), ignore_index=_IGNORED)

    def judge(self, output: Any, answers: Tensor) -> dict[str, Tensor]:
        """Return the tags that were given, and the entities found, given and right of each kind."""
        given = logits_of(output).argmax(-1)
        rows = [self._counted(mine.tolist(), right.tolist()) for mine, right in zip(given, answers, strict=True)]
        words = answers != _IGNORED
        return {
            "answer": torch.where(words, given, 0),
            "hit_words": ((given == answers) & words).sum(-1),
            "words": words.sum(-1),
            **{name: torch.stack([row[index] for row in rows]) for index, name in enumerate(Counts._fields)},
        }

    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return for every word the tag that it has most often in training, the most frequent of all for a new one."""
        known: dict[str, Counter[str]] = {}
        for item in self.sides.training:
            for word, tag in zip(item.words, item.tags, strict=True):
                known.setdefault(word, Counter())[tag] += 1
        every = sum(known.values(), Counter[str]())
        best = {word: self.labels.index(found.most_common(1)[0][0]) for word, found in known.items()}
        usual = self.labels.index(every.most_common(1)[0][0])
        answers = self.examples("evaluation", tokenizer).answers
        given = torch.zeros_like(answers)
        for row, item in enumerate(self.sides.evaluation):
            places = (answers[row] != _IGNORED).nonzero().flatten().tolist()
            for place, word in zip(places, item.words, strict=False):
                given[row, place] = best.get(word, usual)
        hot = functional.one_hot(given, len(self.labels))
        columns = self.judge(hot, answers)
        return "each word's most frequent tag", {name: column.double().numpy() for name, column in columns.items()}

    def metrics(self) -> tuple[Metric, ...]:
        """F1 over all entities first, the mean over the kinds, each kind; the share of words; and the agreement with the baseline."""
        named = [
            _entities(f"f1_{kind.lower()}", f1, index)
            for index, kind in enumerate(self.entity_kinds)
            if len(self.entity_kinds) <= _MOST_NAMED
        ]
        return (
            _entities("f1", f1),
            _entities("precision", precision),
            _entities("recall", recall),
            *named,
            Metric("accuracy", "share", True, lambda c: c["hit_words"].sum(-1) / c["words"].sum(-1), lambda c: c["hit_words"] / c["words"]),
            Metric("agreement", "share", True, lambda c: c["same"].mean(-1), lambda c: c["same"], relative=True),
        )

    def _counted(self, given: list[int], right: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        places = [place for place, answer in enumerate(right) if answer != _IGNORED]
        mine, theirs = (set(entities([self.labels[side[place]] for place in places])) for side in (given, right))
        sums = [Counter(kind for kind, _, _ in found) for found in (mine & theirs, mine, theirs)]
        return tuple(torch.tensor([one[kind] for kind in self.entity_kinds]) for one in sums)  # type: ignore[return-value]


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, first, one after the last) of the entities in a row of tags.

    ``B-X`` begins an entity; ``I-X`` goes on with one of kind X, or begins it, as in CoNLL-2003; a tag without either is one by itself, and
    ``O`` none.
    """
    begun: tuple[str, int] | None = None
    for place, tag in enumerate([*tags, "O"]):
        goes_on = begun is not None and tag == f"I-{begun[0]}"
        if begun is not None and not goes_on:
            yield begun[0], begun[1], place
            begun = None
        if tag != "O" and not goes_on:
            begun = (_kind(tag), place)


def _kind(tag: str) -> str:
    return tag[2:] if tag[:2] in ("B-", "I-") else tag


def _entities(name: str, score: Score, kind: int | None = None) -> Metric:
    """Return a metric over all entities together, or those of one kind."""

    def of(columns: Samples, axis: int | None) -> Array:
        sums = [columns[field] if axis is None else columns[field].sum(axis) for field in Counts._fields]
        return score(Counts(*(one.sum(-1) if kind is None else one[..., kind] for one in sums)))

    return Metric(name, "share", True, lambda c: of(c, -2), lambda c: of(c, None))
