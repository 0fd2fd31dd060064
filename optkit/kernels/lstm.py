"""A packed ``nn.LSTM``: weight-only int8. Long sequences still take one small product a step, which no kernel can join."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from optkit.kernels.recurrent import PackedRecurrent, States


class Int8LSTM(PackedRecurrent, nn.LSTM):
    """An LSTM with int8 weights, of the sizes of the plain one (Hochreiter and Schmidhuber 1997; gates as PyTorch has them)."""

    plain: ClassVar[type[nn.RNNBase]] = nn.LSTM
    gates: ClassVar[int] = 4

    def cell(self, given: Tensor, product: Tensor, states: States) -> States:
        """Return hidden and cell state: c' = s(f) c + s(i) tanh(g) and h' = s(o) tanh(c'), where i, f, g, o = given + product."""
        inward, forget, new, outward = (given + product).chunk(4, dim=-1)
        held = torch.sigmoid(forget) * states[1] + torch.sigmoid(inward) * torch.tanh(new)
        return torch.sigmoid(outward) * torch.tanh(held), held
