"""Steps for which each process keeps a share of the weights, their gradients and averages, and has a block whole only while it computes.

This is fully sharded data parallelism (Zhao et al. 2023, arXiv 2304.11277) by ``torch.distributed.fsdp.fully_shard``; accelerate, which
sums gradients elsewhere, offers it on accelerators only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.group import Group
from optkit.engines.parallel.cut import fill, hollow
from optkit.transforms.layers import blocks
from optkit.transforms.training.shared import SharedSteps


class ShardedSteps(SharedSteps):
    """The part of one process in every step. While it lasts, the student's own weights are empty."""

    def __init__(self, group: Group, student: nn.Module) -> None:
        super().__init__(group, student)
        self._student = student
        self._asked = dict(student.named_parameters())
        state = student.state_dict()
        self.trained = hollow(student)
        fill(self.trained, state)
        for name, parameter in self.trained.named_parameters():
            parameter.requires_grad_(self._asked[name].requires_grad)
        del state
        self._shard()
        for parameter in self._asked.values():
            parameter.data = parameter.data.new_empty(0)
        self._sharded: list[Any] = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        self.parameters = [nn.Parameter(parameter.to_local().detach()) for parameter in self._sharded]
        self.kept = _Kept(self.parameters, self.trained)

    def owns_checkpoints(self) -> str:
        """Return the name of the folder for this process's share."""
        return f"rank-{self._group.rank}"

    def is_due(self, own: bool) -> bool:
        """Return what the first process finds: all keep their shares of one step."""
        return bool(self._group.join([own])[0])

    def add_up(self, loss: float) -> float:
        """Take this process's share of the gradients, which are summed already, and return the sum of all shares of the loss."""
        from accelerate.utils import reduce

        for own, sharded in zip(self.parameters, self._sharded, strict=True):
            own.grad = None if sharded.grad is None else sharded.grad.to_local()
        return float(reduce(torch.tensor([loss]), reduction="sum"))

    def forget(self) -> None:
        """Let go of all gradients."""
        super().forget()
        for parameter in self._sharded:
            parameter.grad = None

    def end(self) -> None:
        """Give the student its weights, whole."""
        whole: Any
        for name, whole in self.trained.named_parameters():
            self._asked[name].data = whole.full_tensor().detach().clone()

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self._group.size,))
        try:
            inner = list(blocks(self.trained)[1])
        except TransformError:
            inner = []
        for layer in (*inner, self.trained):
            fully_shard(layer, mesh=mesh)
            layer.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            layer.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no other


class _Kept(nn.Module):
    """What a checkpoint of one process holds: its shares, and the buffers that everyone has."""

    def __init__(self, parameters: list[nn.Parameter], trained: nn.Module) -> None:
        super().__init__()
        self.shares = nn.ParameterList(parameters)
        for number, (_, buffer) in enumerate(trained.named_buffers()):
            self.register_buffer(f"buffer_{number}", buffer)
