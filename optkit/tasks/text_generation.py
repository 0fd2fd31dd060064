"""Going on with a text: how well its next tokens are predicted, and how near greedy continuations come to what stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Kind, Subject
from optkit.data.documents import files_of, texts_of
from optkit.data.hub import hub_rows
from optkit.data.python_sources import sources_by_side
from optkit.data.sides import Side, Sides, parted, stretched
from optkit.tasks.answering import mean_of, predictions
from optkit.tasks.language_modeling import TextFiles
from optkit.tasks.supervised import Examples, Supervised, logits_of
from optkit.tasks.windows import cut, prompts_of, refuse_unknown_tokens, spread, stream_of

Count = Annotated[int, Field(ge=2, le=1_000_000)]
_FEW = 32  # documents, which are cut instead of parted
_VALIDATED = 128  # windows that a training looks at


class TextHub(Settings):
    """A data set of the Hub."""

    hub: str = Field(description="data set name, owner/name")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", description="split that is read, and parted here")
    column: str = Field(default="text", description="column with the text")
    items: Annotated[int, Field(ge=16)] = Field(default=20_000, description="rows that are read, at most")


class TextGeneration(Supervised):
    """Perplexity; and of greedy continuations chrF by sacrebleu, equal first lines, and the share of n-grams that do not repeat.

    distinct-n: Li et al. 2015, arXiv 1510.03055, within each continuation.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("causal-lm",)
    only_judging: ClassVar[frozenset[str]] = frozenset({"prompt_tokens", "answer_tokens", "windows"})
    corpus: Literal["python"] | TextFiles | TextHub = Field(default="python", description="'python' is the standard library, by file")
    prompt_tokens: Count = Field(default=64, description="tokens that are gone on with")
    answer_tokens: Count = Field(default=24, description="tokens of a continuation")
    window: Count = Field(default=128, description="tokens the model sees at once, prompt and continuation among them")
    windows: Count = Field(default=256, description="windows that are evaluated, at most")

    def read(self) -> Sides[str]:
        """Return the texts; a few long documents are cut instead of parted."""
        if isinstance(self.corpus, str):
            return sources_by_side()
        if isinstance(self.corpus, TextHub):
            rows = hub_rows(self.corpus.hub, self.corpus.subset, self.corpus.split, (self.corpus.column,), self.corpus.items)
            name, texts = self.corpus.hub, [row.text(self.corpus.column) for row in rows]
        else:
            paths = files_of(self.corpus.files)
            name, texts = ", ".join(path.name for path in paths), [text for path in paths for text in texts_of(path, self.corpus.column)]
        kept = [text for text in dict.fromkeys(texts) if text.strip()]
        return stretched(name, kept) if len(kept) < _FEW else parted(name, [(text, text) for text in kept])

    def needs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the number of token ids, the one that ends a text, and the longest text."""
        return {"per": "text", "vocabulary": len(tokenizer), "end": tokenizer.eos_token_id, "positions": self.window}

    def withheld(self, subject: Subject) -> str | None:
        """Random weights and models without a tokenizer are not judged."""
        return super().withheld(subject) or ("the model has no tokenizer" if subject.tokenizer is None else None)

    def examples(self, side: Side, tokenizer: Any) -> Examples:
        """Return windows of token ids (items, window), as inputs and as answers."""
        known, windows = self._kept.get(side, (None, None))
        if windows is None or known is not tokenizer:
            windows = cut(stream_of(tokenizer, self.sides.of(side)), self.window, None)
            most = {"evaluation": self.windows, "validation": _VALIDATED}.get(side, len(windows))
            windows = spread(windows, most)
            self._kept[side] = tokenizer, windows
        return Examples({"input_ids": windows}, windows)

    def loss(self, output: Any, answers: Tensor) -> Tensor:
        """Return the cross entropy of the next token."""
        return functional.cross_entropy(logits_of(output)[:, :-1].float().flatten(0, 1), answers[:, 1:].flatten())

    def judged(self, subject: Subject, engine: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return how well the windows are predicted, and what is made of the continuations of their beginnings."""
        refuse_unknown_tokens(subject, answers)
        logits, wanted = engine.score(answers)[:, :-1].cpu().float(), answers[:, 1:]
        nats = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        begun = answers[:, : self.prompt_tokens]
        tokens = [engine.first(begun).cpu()]
        tokens += [one.cpu() for one in engine.further(tokens[0], self.answer_tokens - 1)]
        engine.reset()
        given = torch.stack(tokens, 1)
        right = answers[:, self.prompt_tokens : self.prompt_tokens + self.answer_tokens]
        texts = [subject.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (given, right)]
        return {
            "nats": nats.sum(1),
            "tokens": torch.full((len(wanted),), wanted.shape[1]),
            "hits": (logits.argmax(-1) == wanted).sum(1),
            "answer": given,
            **self.judge(texts[0], texts[1]),
        }

    def judge(self, output: Any, answers: Any) -> dict[str, Tensor]:
        """Return the columns of continuations, given and right, as texts."""
        from sacrebleu.metrics import CHRF

        chrf = CHRF()
        rows = [
            {
                "chrf": chrf.sentence_score(given, [right]).score / 100,
                "exact_match": float(given.partition("\n")[0].strip() == right.partition("\n")[0].strip()),
                "distinct_1": distinct(given.split(), 1),
                "distinct_2": distinct(given.split(), 2),
                "length_error": float(abs(len(given.split()) - len(right.split()))),
            }
            for given, right in zip(output, answers, strict=True)
        ]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

    def trivial(self, tokenizer: Any) -> tuple[str, Samples]:
        """Return the prompt once more for its continuation, and the frequencies of tokens in training for their probabilities."""
        answers = self.examples("evaluation", tokenizer).answers
        seen = torch.bincount(self.examples("training", tokenizer).answers.flatten(), minlength=len(tokenizer)).double() + 1
        wanted = answers[:, 1:]
        ends = self.prompt_tokens + self.answer_tokens
        given, right = answers[:, : self.answer_tokens], answers[:, self.prompt_tokens : ends]
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (given, right)]
        columns = {
            "nats": -(seen / seen.sum()).log()[wanted].sum(1),
            "tokens": torch.full((len(wanted),), wanted.shape[1]),
            "hits": (wanted == seen.argmax()).sum(1),
            **self.judge(*texts),
        }
        return "how often each token stands anywhere", {name: column.double().numpy() for name, column in columns.items()}

    def metrics(self) -> tuple[Metric, ...]:
        """Return the perplexity first."""
        perplexity, accuracy, agreement = predictions()
        kinds = (
            mean_of("chrf"),
            mean_of("exact_match"),
            mean_of("distinct_1"),
            mean_of("distinct_2"),
            mean_of("length_error", "words", better=False),
        )
        return (perplexity, accuracy, *kinds, agreement)

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        """Return beginnings of evaluated text; for a subject without a tokenizer, random ids from a fixed seed."""
        return prompts_of(subject, lambda: stream_of(subject.tokenizer, self.sides.evaluation), count, length)

    @cached_property
    def _kept(self) -> dict[Side, tuple[Any, Tensor]]:
        """Windows of each side, cut once for a tokenizer."""
        return {}


def distinct(words: Sequence[str], length: int) -> float:
    """Return the share of n-grams of this length that are distinct; 1 where there is none."""
    grams = list(zip(*(words[start:] for start in range(length)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
