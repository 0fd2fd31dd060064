"""A model with all that is needed to run, judge and save it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from optkit.core.group import ALONE as GROUP_OF_ONE
from optkit.core.group import Group
from optkit.core.mesh import ALONE, Mesh

Execution = Literal["real", "simulated", "neutral"]  # neutral: it claims no gain in speed or size
Kind = Literal["causal-lm", "seq2seq-lm", "module"]
GENERATING: tuple[Kind, ...] = ("causal-lm", "seq2seq-lm")


@dataclass(frozen=True)
class Step:
    """One transform that a subject has been through, as it is written into artefacts and reports."""

    name: str
    settings: Mapping[str, Any]
    execution: Execution
    opens_in: Literal["transformers", "optkit"]


@dataclass(frozen=True)
class Subject:
    """A model on its way through a recipe. Transforms return a new one with a longer history.

    ``kind`` says which engine fits: a causal language model goes on with a text, a sequence-to-sequence model answers one, a plain
    module only runs forward. ``trained`` is False
    for random weights: quality is then withheld. ``mesh`` says how many processes serve it together, and in which roles. ``network``
    says how a module that was trained here is made anew: the name of its network, its settings, and what its task needs.
    """

    module: nn.Module
    source: str
    kind: Kind = "causal-lm"
    tokenizer: Any = None
    trained: bool = True
    mesh: Mesh = ALONE
    network: Mapping[str, Any] | None = None
    history: tuple[Step, ...] = ()

    @property
    def execution(self) -> Literal["real", "simulated"]:
        """``simulated`` where some step claims a gain and no step has a kernel that profits; else ``real``."""
        kinds = {step.execution for step in self.history}
        return "simulated" if "simulated" in kinds and "real" not in kinds else "real"

    @property
    def opens_in(self) -> Literal["transformers", "optkit"]:
        """Which loader the saved artefact needs."""
        return "optkit" if any(step.opens_in == "optkit" for step in self.history) else "transformers"


@dataclass(frozen=True)
class Calibration:
    """Data that a transform may look at; never part of the evaluation. ``batches`` are the model's keyword arguments.

    ``untouched`` opens the model as it was before the first transform, for those that compare with it; None where nobody has kept it.
    ``open_model`` opens another model by the words of a recipe. ``checkpoints`` is a folder where a long transform may keep its state,
    to go on from it after an interruption. ``group`` are the processes that train together. ``tell`` hears how far it has come.
    """

    batches: tuple[Mapping[str, Tensor], ...] = field(default=())
    untouched: Callable[[], nn.Module] | None = None
    open_model: Callable[[str], nn.Module] | None = None
    checkpoints: Path | None = None
    group: Group = GROUP_OF_ONE
    tell: Callable[[str], None] = lambda text: None
