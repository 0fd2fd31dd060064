"""A few words for many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from optkit.core.measurement import Metric
from optkit.data.functions import bodies_with_summaries
from optkit.data.sides import Asked, Sides
from optkit.tasks.answering import Answering, Length, PairFiles, PairHub, mean_of, pairs_of, predictions

_KINDS = ("rouge1", "rouge2", "rougeL")


class Summarization(Answering):
    """ROUGE (Lin 2004, https://aclanthology.org/W04-1013), F-measures by torchmetrics, mean over items; and how far the length is off."""

    corpus: Literal["functions"] | PairFiles | PairHub = Field(
        default="functions",
        description="'functions' are the words of those of the standard library, with the first line of what they say of themselves",
    )
    packages: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="files of installed packages, evenly spread, whose functions are learnt from as well; nothing is judged by them",
    )
    text_tokens: Length = Field(default=192, description="tokens of a text, at most")

    def read(self) -> Sides[Asked]:
        """Return the texts with their summaries."""
        return bodies_with_summaries(self.packages) if isinstance(self.corpus, str) else pairs_of(self.corpus)

    def scores(self, given: str, item: Asked) -> dict[str, Any]:
        """Return each ROUGE's F-measure, and by how many words the length is off."""
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(given, item.answers[0], rouge_keys=_KINDS)
        return {
            **{kind.lower(): float(found[f"{kind}_fmeasure"]) for kind in _KINDS},
            "length_error": float(abs(len(given.split()) - len(item.answers[0].split()))),
        }

    def trivially(self, item: Asked) -> str:
        """Return the text's first twelve words."""
        return " ".join(item.text.split()[:12])

    def metrics(self) -> tuple[Metric, ...]:
        """Return ROUGE-L first."""
        return (mean_of("rougel"), mean_of("rouge1"), mean_of("rouge2"), mean_of("length_error", "words", better=False), *predictions())
