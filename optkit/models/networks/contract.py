"""The contract of a network: its sizes, how it is trained, and the module that they make for a task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from optkit.core.settings import Settings
from optkit.core.subject import Kind

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Training(Settings):
    """How long and how fast: AdamW with a rate that rises for a tenth of the steps and falls along a cosine to 0."""

    steps: Count = Field(default=600, description="optimizer steps, at most")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-3, description="peak rate of AdamW")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(default=32, description="items a step")
    dropout: bool = Field(default=True, description="draw the dropout that the network has")
    check_every: Count = Field(default=100, description="steps between looks at the validation items; the best state is kept")
    patience: Count = Field(default=3, description="looks without a better state before it ends early")


class Network(Settings):
    """An architecture with its sizes, and how it is trained."""

    kind: ClassVar[Kind] = "module"
    training: Training = Field(default=Training(), description="how it is trained")

    @abstractmethod
    def build(self, needs: Mapping[str, Any]) -> nn.Module:
        """Return the module, its weights drawn from PyTorch's generator.

        Args:
            needs: what the task says that a model for it must have.

        Raises:
            ModelError: this network is for other tasks.
        """
