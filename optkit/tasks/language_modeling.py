"""Predicting the next token of a text: perplexity, bits per byte, accuracy, and fidelity to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.measurement import Metric, Samples
from optkit.core.settings import Settings
from optkit.core.subject import Calibration, Kind, Subject
from optkit.data.documents import Corpus, file_corpus, files_of, hub_corpus, python_corpus
from optkit.tasks.answers import Answers, kept_positions
from optkit.tasks.contract import DataCard, Task
from optkit.tasks.windows import cut, prompts_of, refuse_unknown_tokens, spread, stream_of

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
_PROMPTS, _PROMPT_TOKENS, _CONTINUED_TOKENS = 16, 64, 48
_LOGIT_BYTES = 256 * 2**20  # float32 logits in memory at once


class HubText(Settings):
    """A data set of the Hub."""

    hub: str = Field(description="data set name, owner/name")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="test", description="split that is evaluated; calibration uses 'train'")
    column: str = Field(default="text", description="column with the text")


class TextFiles(Settings):
    """Text, CSV, JSONL or Parquet files."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or patterns; .txt, .md, .rst, .py, .csv, .jsonl, .parquet")
    column: str = Field(default="text", description="field or column with the text, for CSV, JSONL and Parquet")


class LanguageModeling(Task):
    """Next-token prediction on a corpus, in windows; perplexity is normalized by token, bits per byte by UTF-8 byte of the same text."""

    kinds: ClassVar[tuple[Kind, ...]] = ("causal-lm",)
    corpus: str | TextFiles | HubText = Field(default="python", description="'python' is the held-out standard library")
    window: Annotated[int, Field(ge=2, le=1_000_000)] = Field(default=512, description="tokens the model sees at once")
    stride: Count | None = Field(default=None, description="tokens between windows; default: window, without overlap")
    tokens: Count = Field(default=65536, description="tokens to evaluate, at most")

    def look(self) -> None:
        """Refuse patterns that match no file."""
        files_of(self._patterns())

    def withheld(self, subject: Subject) -> str | None:
        """Random weights and models without a tokenizer are not judged."""
        return super().withheld(subject) or ("the model has no tokenizer" if subject.tokenizer is None else None)

    def card(self, subject: Subject) -> DataCard:
        """Describe the evaluated windows."""
        corpus, windows = self._evaluated(subject)
        window = windows.shape[1]
        detail = {"window": window, "stride": self.stride or window, "windows": len(windows), "normalizer": "token and byte"}
        return DataCard("language-modeling", corpus.name, corpus.sha256, windows.numel(), detail)

    def calibration(self, subject: Subject, items: int = 32) -> Calibration:
        """Return windows of the calibration texts, evenly spread over them, in batches of 4."""
        windows = cut(self._stream(subject, "calibration"), self._window(subject), None)
        return Calibration(tuple({"input_ids": rows} for rows in spread(windows, items).split(4)))

    def evaluate(self, subject: Subject, engine: Any, group: Group, reference: Path | None, keep: Path | None) -> Samples:
        """Return a row a window: sums of negative log likelihood (nats), tokens, bytes, hits; and the agreement with the baseline."""
        _, windows = self._evaluated(subject)
        rows = group.rows(len(windows))
        baseline = Answers.read(reference) if reference else None
        first = max(1, windows.shape[1] - (self.stride or windows.shape[1]))
        positions = windows.shape[1] - first
        vocabulary: int = subject.module.config.vocab_size  # type: ignore[union-attr,assignment]
        kept = kept_positions(len(windows), positions, vocabulary)
        scored: list[dict[str, float]] = []
        top1, distributions = [], []
        for index, logits in _logits(engine, windows[rows], first, vocabulary):
            window = windows[rows][index]
            log_probabilities = logits[kept].log_softmax(-1)
            row = _score(subject, window, logits, first)
            if baseline is not None:
                row |= _agreement(logits, log_probabilities, baseline, rows.start + index)
            scored.append(row)
            if keep is not None:
                top1.append(logits.argmax(-1).int())
                distributions.append(log_probabilities)
        greedy = self._continue(subject, engine, group)
        if keep is not None and group.leads:
            mine = greedy[group.rows(len(greedy))]
            best = _stacked(top1, torch.int32, positions)
            Answers(best, _stacked(distributions, torch.float32, len(kept), vocabulary), mine).write(keep, group.rank)
        columns = _columns(group.join(scored))
        if baseline is not None:
            columns["greedy_equal"] = (greedy == baseline.greedy).double().mean(1).numpy()
        return columns

    def metrics(self) -> tuple[Metric, ...]:
        """Perplexity first; the last three exist only against the baseline."""

        def share(over: str, under: str, scale: float = 1.0) -> dict[str, Any]:
            return {
                "estimate": lambda c: c[over].sum(-1) / c[under].sum(-1) * scale,
                "each": lambda c: c[over] / c[under] * scale,
            }

        return (
            Metric(
                "perplexity",
                "",
                False,
                estimate=lambda c: np.exp(c["nats"].sum(-1) / c["tokens"].sum(-1)),
                each=lambda c: np.exp(c["nats"] / c["tokens"]),
            ),
            Metric("bits_per_byte", "bits", False, **share("nats", "bytes", 1 / math.log(2))),
            Metric("token_accuracy", "share", True, **share("hits", "tokens")),
            Metric("kl_divergence", "nats", False, relative=True, **share("divergence", "kept")),
            Metric("top1_agreement", "share", True, relative=True, **share("agreed", "tokens")),
            Metric("greedy_match", "share", True, lambda c: c["greedy_equal"].mean(-1), lambda c: c["greedy_equal"], relative=True),
        )

    def prompts(self, subject: Subject, count: int, length: int) -> Tensor:
        """Return beginnings of evaluation windows; for a subject without a tokenizer, random ids from a fixed seed."""
        return prompts_of(subject, lambda: self._stream(subject, "evaluation"), count, length)

    def _continue(self, subject: Subject, engine: Any, group: Group) -> Tensor:
        prompts = self.prompts(subject, _PROMPTS, _PROMPT_TOKENS)
        mine = prompts[group.rows(len(prompts))]
        tokens = [engine.first(mine)] if len(mine) else []
        if tokens:
            tokens += engine.further(tokens[0], _CONTINUED_TOKENS - 1)
        engine.reset()
        return torch.tensor(group.join(torch.stack(tokens, 1).tolist() if tokens else []))

    def _evaluated(self, subject: Subject) -> tuple[Corpus, Tensor]:
        windows = cut(self._stream(subject, "evaluation"), self._window(subject), self.stride)
        return self._texts(), spread(windows, max(1, self.tokens // windows.shape[1]))

    def _window(self, subject: Subject) -> int:
        longest = getattr(subject.module.config, "max_position_embeddings", None) or self.window
        return min(self.window, longest) if isinstance(longest, int) else self.window

    def _stream(self, subject: Subject, part: Literal["calibration", "evaluation"]) -> Tensor:
        """Return the token ids of one part of the corpus, made once for a tokenizer: it takes seconds, and is asked for again and again."""
        tokenizer, stream = self._kept.get((part, self.corpus), (None, None))
        if stream is None or tokenizer is not subject.tokenizer:
            stream = self._fitting(subject, getattr(self._texts(), part))
            self._kept[part, self.corpus] = subject.tokenizer, stream
        found: Tensor = stream
        return found

    def _fitting(self, subject: Subject, texts: tuple[str, ...]) -> Tensor:
        if subject.tokenizer is None:
            raise DataError(f"model {subject.source!r} has no tokenizer, so no text can be given to it")
        if not texts:
            raise DataError("the corpus has too little text to set some aside for calibration; give more")
        stream = stream_of(subject.tokenizer, texts)
        refuse_unknown_tokens(subject, stream)
        return stream

    def _texts(self) -> Corpus:
        if self.corpus not in self._kept:
            self._kept[self.corpus] = self._read()
        found: Corpus = self._kept[self.corpus]
        return found

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        """What was read, by the corpus it is of: copies of a task with other settings share it."""
        return {}

    def _read(self) -> Corpus:
        if isinstance(self.corpus, TextFiles):
            return file_corpus(self.corpus.files, self.corpus.column)
        if isinstance(self.corpus, HubText):
            return hub_corpus(self.corpus.hub, self.corpus.subset, self.corpus.split, self.corpus.column)
        if self.corpus == "python":
            return python_corpus()
        return file_corpus(self._patterns(), "text")

    def _patterns(self) -> tuple[str, ...]:
        if isinstance(self.corpus, TextFiles):
            return self.corpus.files
        return (self.corpus,) if isinstance(self.corpus, str) and self.corpus != "python" else ()


@torch.inference_mode()
def _logits(engine: Any, windows: Tensor, first: int, vocabulary: int) -> Iterator[tuple[int, Tensor]]:
    """Yield for each window its number and the float32 logits (t, v) that predict its tokens from ``first`` on, as the engine sees it."""
    together = max(1, min(8, _LOGIT_BYTES // (4 * windows.shape[1] * vocabulary)))
    for start in range(0, len(windows), together):
        batch = engine.score(windows[start : start + together])
        for offset, logits in enumerate(batch):
            yield start + offset, logits[first - 1 : -1].cpu().float()


def _score(subject: Subject, window: Tensor, logits: Tensor, first: int) -> dict[str, float]:
    wanted = window[first:]
    text = subject.tokenizer.decode(wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {
        "nats": float(nn.functional.cross_entropy(logits, wanted, reduction="sum")),
        "tokens": float(wanted.numel()),
        "bytes": float(max(1, len(text.encode()))),
        "hits": float((logits.argmax(-1) == wanted).sum()),
    }


def _agreement(logits: Tensor, log_probabilities: Tensor, baseline: Answers, row: int) -> dict[str, float]:
    before = baseline.log_probabilities[row]
    divergence = (before.exp() * (before - log_probabilities)).sum()
    return {
        "agreed": float((logits.argmax(-1) == baseline.top1[row]).sum()),
        "divergence": float(divergence),
        "kept": float(len(before)),
    }


def _stacked(rows: list[Tensor], kind: torch.dtype, *shape: int) -> Tensor:
    """Stack the rows of a rank; one that had no window of its own has none."""
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=kind)


def _columns(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
