"""Lets a compressed model learn its old answers again: a short training by those of a teacher. It takes minutes, and wins back much."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Execution, Step, Subject
from optkit.transforms.contract import Plan, Stage
from optkit.transforms.distill.losses import Distillation
from optkit.transforms.prune.gradual import GradualPruning
from optkit.transforms.training.contract import TrainingTransform
from optkit.transforms.training.loop import heal

Weight = Annotated[float, Field(ge=0, le=1000)]


class Distill(TrainingTransform):
    """Train the model by a teacher's answers (Hinton et al. 2015, arXiv 1503.02531); zeros that pruning has made stay zero."""

    stage: ClassVar[Stage] = Stage.DISTILL
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    execution: ClassVar[Execution] = "neutral"
    teacher: str | None = Field(
        default=None,
        max_length=1000,
        description="another model to learn from: a folder, or a name of the Hub; default: the one before any transform",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(default=1.0, description="divides both models' logits")
    logits: Weight = Field(default=1.0, description="weight of the divergence of the answers")
    hidden: Weight = Field(default=0.0, description="weight of the distance of the hidden states")
    attention: Weight = Field(default=0.0, description="weight of the divergence of where the heads look")
    next_token: Weight = Field(default=0.0, description="weight of the next token of the text itself")
    gradual: GradualPruning | None = Field(default=None, description="zeros that grow in number while the rest learns")

    def step(self) -> Step:
        """Return the step; zeros that nothing skips are a simulation, here as by any other pruning."""
        return super().step() if self.gradual is None else replace(super().step(), execution="simulated")

    def check(self, plan: Plan) -> None:
        """Refuse random weights, and a course that would learn nothing."""
        if not plan.subject.trained:
            raise TransformError("distill heals a trained model, and the weights of this one are random; leave it out to measure its speed")
        if not (self.logits or self.hidden or self.attention or self.next_token):
            raise TransformError("nothing would be learned: give logits, hidden, attention or next_token a weight above 0")
        self.refuse_idle_ranks()
        if self.gradual is not None:
            if self.sharded:
                raise TransformError("gradual chooses zeros by looking at whole weights, and sharded ranks have parts; leave out one")
            self.gradual.check(plan)

    def preview(self, subject: Subject) -> Subject:
        """Return the same shapes."""
        return replace(subject, history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module, trained in float32 and given back in the dtypes it had.

        Raises:
            TransformError: there is no data, no teacher where one is wanted, or the loss is no number.
        """
        data = data or Calibration()
        if not data.batches:
            raise TransformError(
                "distill needs data to train on, and there is none; give the task a corpus with more text, or pass Calibration(batches)"
            )
        loss = Distillation(self._teacher(module, data), self.temperature, self.logits, self.hidden, self.attention, self.next_token)
        dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        looked = getattr(getattr(module, "config", None), "_attn_implementation", None)
        module.float()
        asked = {parameter: parameter.requires_grad for parameter in module.parameters()}
        module.requires_grad_(True)
        schedule = self.gradual.schedule(module, self.steps) if self.gradual is not None else None
        heal(module, loss, data, self.course(), schedule.step if schedule else None)
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        if self.attention and looked is not None:
            module.set_attn_implementation(looked)  # type: ignore[operator]
        return _in_dtypes(module, dtypes)

    def _teacher(self, module: nn.Module, data: Calibration) -> nn.Module | None:
        if not (self.logits or self.hidden or self.attention):
            return None
        if self.teacher is None:
            return data.untouched() if data.untouched else copy.deepcopy(module)
        if data.open_model is None:
            raise TransformError(f"teacher {self.teacher!r} can only be opened in a recipe; in training code use Distillation(teacher)")
        return data.open_model(self.teacher)


def _in_dtypes(module: nn.Module, dtypes: dict[str, torch.dtype]) -> nn.Module:
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
    return module
