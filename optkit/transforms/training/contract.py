"""What the transforms that train share: how long, how fast, on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from optkit.core.errors import TransformError
from optkit.transforms.contract import Transform
from optkit.transforms.training.loop import Course


class TrainingTransform(Transform):
    """A transform that trains the model on the calibration side of the task."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=200, description="optimizer steps")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-4, description="peak rate of AdamW")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(default=4, description="sequences a forward pass")
    accumulation: Annotated[int, Field(ge=1, le=4096)] = Field(default=1, description="forward passes a step")
    length: Annotated[int, Field(ge=2, le=1_000_000)] = Field(default=256, description="tokens a sequence, at most")
    dropout: bool = Field(default=False, description="draw the dropout that the model has, as in its own training")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the products while it trains; weights, averages and losses are float32 in either case"
    )
    ranks: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="processes that share every batch, by rows")
    sharded: bool = Field(
        default=False, description="the ranks also share weights, gradients and averages (FSDP): less memory each, more time"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="draws the order of the data, and the dropout")

    @property
    def needs_data(self) -> bool:
        """It trains on calibration data."""
        return True

    @property
    def data_items(self) -> int:
        """As many windows as are trained on."""
        return self.steps * self.batch_size * self.accumulation

    @property
    def processes(self) -> int:
        """As many as share its batches."""
        return self.ranks

    def refuse_idle_ranks(self) -> None:
        """Refuse more processes than a batch has rows, and shares of weights among one.

        Raises:
            TransformError: with the numbers.
        """
        if self.ranks > self.batch_size:
            remedy = f"use ranks {self.batch_size}, or a larger batch_size"
            raise TransformError(f"{self.ranks} ranks cannot share batches of {self.batch_size}; {remedy}")
        if self.sharded and self.ranks == 1:
            raise TransformError("one rank has no other to share its weights with; give ranks, or leave out sharded")

    def course(self) -> Course:
        """Return how the loop trains."""
        return Course(
            self.steps,
            self.learning_rate,
            self.batch_size,
            self.length,
            self.seed,
            self.accumulation,
            self.dropout,
            self.precision,
            self.sharded,
        )
