"""For the Trainer of transformers: pruned weights stay zero, zeros grow in number, and a teacher's answers are the loss.

    trainer = DistillationTrainer(loss=Distillation(teacher), model=student, args=..., train_dataset=..., callbacks=[KeepZeros()])

For a loop of one's own the same parts are called by hand: ``Distillation``, ``Zeros``, ``GradualPruning(...).schedule(model, steps)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from optkit.transforms.distill.losses import Distillation
from optkit.transforms.prune.gradual import GradualPruning, Schedule
from optkit.transforms.training.zeros import Zeros


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """What is zero when training begins stays zero."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **rest: Any) -> None:
        """Note the zeros."""
        self._zeros = Zeros(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Set them again."""
        self._zeros.apply()


class PruneGradually(TrainerCallback):  # type: ignore[misc]
    """Zeros grow in number over the training, by a cubic schedule."""

    def __init__(self, settings: GradualPruning) -> None:
        self._settings = settings
        self._schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **rest: Any) -> None:
        """Lay the schedule out over the steps of the training."""
        self._schedule = self._settings.schedule(model, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Choose further zeros where it is time."""
        assert self._schedule is not None
        self._schedule.step(state.global_step)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with a teacher's answers for a loss; all its arguments and those of ``Distillation`` hold."""

    def __init__(self, *, loss: Distillation, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._distillation = loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean, and is to be averaged over accumulated batches
        if loss.teacher is not None:
            loss.teacher.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **rest: Any) -> Any:
        """Return the loss of a batch; labels are not looked at."""
        batch = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        loss = self._distillation(model, batch)
        return (loss, {"loss": loss}) if return_outputs else loss
