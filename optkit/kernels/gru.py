"""A packed ``nn.GRU``: weight-only int8. Long sequences still take one small product a step, which no kernel can join."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from optkit.kernels.recurrent import PackedRecurrent, States


class Int8GRU(PackedRecurrent, nn.GRU):
    """A GRU with int8 weights, of the sizes of the plain one (Cho et al. 2014, arXiv 1406.1078; gates as PyTorch has them)."""

    plain: ClassVar[type[nn.RNNBase]] = nn.GRU
    gates: ClassVar[int] = 3

    def cell(self, given: Tensor, product: Tensor, states: States) -> States:
        """Return the hidden state: h' = (1 - z) n + z h, where r, z = s(given + product) and n = tanh(given + r product)."""
        reset_in, update_in, new_in = given.chunk(3, dim=-1)
        reset_by, update_by, new_by = product.chunk(3, dim=-1)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_by) * new_by)
        return (torch.lerp(new, states[0], torch.sigmoid(update_in + update_by)),)
