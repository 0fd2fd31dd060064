"""One text for another in another language."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from optkit.core.errors import DataError
from optkit.core.measurement import Array, Metric, Samples
from optkit.core.settings import Settings
from optkit.data.documents import files_of
from optkit.data.numbers import numbers_and_words
from optkit.data.reading import lines_of
from optkit.data.sides import Asked, Sides
from optkit.tasks.answering import Answering, PairFiles, PairHub, asked, mean_of, pairs_of, predictions


class ParallelFiles(Settings):
    """Two text files whose lines translate one another."""

    source_file: str = Field(description="path of the texts, one a line")
    target_file: str = Field(description="path of their translations, one a line")


class Translation(Answering):
    """chrF (mean over items), BLEU (over the corpus), both by sacrebleu (Post 2018, arXiv 1804.08771), and exact matches."""

    corpus: Literal["numbers"] | ParallelFiles | PairFiles | PairHub = Field(
        default="numbers", description="'numbers' are whole numbers in digits and in English words, both ways"
    )

    def read(self) -> Sides[Asked]:
        """Return the texts with their translations."""
        if isinstance(self.corpus, str):
            return numbers_and_words()
        if not isinstance(self.corpus, ParallelFiles):
            return pairs_of(self.corpus)
        paths = [files_of([name])[0] for name in (self.corpus.source_file, self.corpus.target_file)]
        sources, targets = (lines_of(path) for path in paths)
        if len(sources) != len(targets):
            raise DataError(f"{paths[0]} has {len(sources)} lines and {paths[1]} has {len(targets)}; lines must translate one another")
        rows = zip(sources, targets, strict=True)
        return asked(paths[0].name, [(f"{paths[0]} row {number}", text, (target,)) for number, (text, target) in enumerate(rows, 1)])

    def scores(self, given: str, item: Asked) -> dict[str, Any]:
        """Return chrF, what BLEU is made of, and whether the answer is right to the letter."""
        chrf, bleu = self._judges
        counted = bleu.corpus_score([given], [[answer] for answer in item.answers])
        return {
            "chrf": chrf.sentence_score(given, item.answers).score / 100,
            "matches": counted.counts,
            "ngrams": counted.totals,
            "lengths": [counted.sys_len, counted.ref_len],
            "exact_match": float(given in item.answers),
        }

    def trivially(self, item: Asked) -> str:
        """Return the text itself."""
        return item.text

    def metrics(self) -> tuple[Metric, ...]:
        """Return chrF first."""
        return (
            mean_of("chrf"),
            Metric("bleu", "share", True, self._bleu, lambda c: c["chrf"]),
            mean_of("exact_match"),
            *predictions(),
        )

    def _bleu(self, columns: Samples) -> Array:
        sums = [columns[name].sum(-2) for name in ("matches", "ngrams", "lengths")]
        draws = zip(*(part.reshape(-1, part.shape[-1]).astype(int).tolist() for part in sums), strict=True)
        found = [self._judges[1].compute_bleu(hits, totals, *lengths, smooth_method="exp").score / 100 for hits, totals, lengths in draws]
        return np.array(found).reshape(sums[0].shape[:-1])

    @cached_property
    def _judges(self) -> tuple[Any, Any]:
        from sacrebleu.metrics import BLEU, CHRF

        return CHRF(), BLEU()
