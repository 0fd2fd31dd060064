"""Merges models of one shape into one, by their weights alone: no larger and no slower than any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Execution, Subject
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.distill.losses import next_token_loss
from optkit.transforms.layers import is_on_meta
from optkit.transforms.merge.rules import State, average, greedy_soup, slerp, task_arithmetic
from optkit.transforms.tracing import evaluating

Spec = Annotated[str, Field(min_length=1, max_length=1000)]


class Merge(Transform):
    """Average this model with others of its shape; a greedy soup leaves those out that make the next token less likely."""

    stage: ClassVar[Stage] = Stage.MERGE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    execution: ClassVar[Execution] = "neutral"
    models: tuple[Spec, ...] = Field(min_length=1, max_length=64, description="the others: folders, or names of the Hub")
    method: Literal["average", "greedy", "slerp", "task_arithmetic"] = Field(
        default="average",
        description="mean of all; mean of those that help; a point on the arc to one other; what the others have learned since, added up",
    )
    share: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="slerp: how far towards the other one")
    scale: Annotated[float, Field(gt=0, le=10)] = Field(default=1.0, description="task_arithmetic: times what the others have learned")

    @model_validator(mode="after")
    def _two_for_an_arc(self) -> Self:
        if self.method == "slerp" and len(self.models) != 1:
            raise ValueError(f"slerp goes from this model to one other; got {len(self.models)} others")
        return self

    @property
    def needs_data(self) -> bool:
        """It opens the others through it, and a greedy soup is judged on it."""
        return True

    @property
    def data_items(self) -> int:
        """Windows that a greedy soup is judged on."""
        return 32 if self.method == "greedy" else 1

    def check(self, plan: Plan) -> None:
        """Shapes of the others are compared when they are opened."""

    def preview(self, subject: Subject) -> Subject:
        """Return the same shapes."""
        return replace(subject, history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with the merged weights.

        Raises:
            TransformError: the others cannot be opened here, or are of another shape.
        """
        if is_on_meta(module):
            return module
        if data is None or data.open_model is None:
            raise TransformError("merge opens its models in a recipe; in training code use the functions of optkit.transforms.merge.rules")
        others = [_state(data.open_model(spec)) for spec in self.models]
        merged = self._merged(module, _state(module), others, data)
        module.load_state_dict(merged, strict=False)
        return module

    def _merged(self, module: nn.Module, own: State, others: Sequence[State], data: Calibration) -> State:
        if self.method == "slerp":
            return slerp(own, others[0], self.share)
        if self.method == "task_arithmetic":
            return task_arithmetic(own, others, self.scale)
        if self.method == "average":
            return average([own, *others])
        if not data.batches:
            raise TransformError("a greedy soup is judged on calibration data, and there is none; use method: average")

        @torch.no_grad()
        def loss_of(state: State) -> float:
            module.load_state_dict(dict(state), strict=False)
            return sum(float(next_token_loss(module, module(**batch), batch)) for batch in data.batches)

        with evaluating(module):
            merged, chosen = greedy_soup([own, *others], loss_of)
        names = ["this model", *self.models]
        data.tell(f"in the soup: {', '.join(names[index] for index in chosen)}")
        return merged


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the parameters and saved buffers, each once."""
    first = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if name in first}
