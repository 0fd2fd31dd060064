"""A packed ``nn.LSTM``: weight-only int8. Where there are kernels, one call goes through all time steps of both directions."""

from __future__ import annotations

import ctypes
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from optkit.kernels.int8 import Int8Linear
from optkit.kernels.recurrent import PackedRecurrent, States


class PassStruct(ctypes.Structure):
    """One pass through time as the C code sees it; the fields follow ``struct pass`` in lstm.c."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
        ("held", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("apart", ctypes.c_int64),
        ("backwards", ctypes.c_int64),
    )


class Int8LSTM(PackedRecurrent, nn.LSTM):
    """An LSTM with int8 weights, of the sizes of the plain one (Hochreiter and Schmidhuber 1997; gates as PyTorch has them)."""

    plain: ClassVar[type[nn.RNNBase]] = nn.LSTM
    gates: ClassVar[int] = 4

    def cell(self, given: Tensor, product: Tensor, states: States) -> States:
        """Return hidden and cell state: c' = s(f) c + s(i) tanh(g) and h' = s(o) tanh(c'), where i, f, g, o = given + product."""
        inward, forget, new, outward = (given + product).chunk(4, dim=-1)
        held = torch.sigmoid(forget) * states[1] + torch.sigmoid(inward) * torch.tanh(new)
        return torch.sigmoid(outward) * torch.tanh(held), held

    def passes(self, flat: Tensor, sizes: list[int], states: list[States], names: list[str]) -> tuple[list[Tensor], list[States]]:
        """Go through time once for each of these places, together where the kernels take it; return outputs and last states of each."""
        hidden = [cast(Int8Linear, self.get_submodule(f"hidden_{name}")) for name in names]
        if not self._in_one_call(flat, sizes, states, hidden):
            return super().passes(flat, sizes, states, names)
        given = [self.get_submodule(f"input_{name}")(flat) for name in names]
        output = flat.new_empty(len(flat), len(names) * self.hidden_size)
        ended = [tuple(state.clone(memory_format=torch.contiguous_format) for state in pair) for pair in states]
        rows = []
        for number, (layer, products, (visible, held), name) in enumerate(zip(hidden, given, ended, names, strict=True)):
            plan = layer.owner.plan
            assert plan is not None
            bias = None if layer.bias is None else layer.bias.data_ptr()
            start = output.data_ptr() + number * self.hidden_size * output.element_size()
            places = (products.data_ptr(), visible.data_ptr(), held.data_ptr(), start, output.shape[1], name.endswith("_reverse"))
            rows.append(PassStruct(plan.address, bias, *places))
        table = (PassStruct * len(rows))(*rows)
        kernels = hidden[0].owner.plan.native  # type: ignore[union-attr]
        status = kernels.lstm(ctypes.addressof(table), len(rows), len(sizes), sizes[0], torch.get_num_threads())
        if status:
            raise MemoryError(f"no memory for the hidden products of {sizes[0]} sequences")
        return list(output.split(self.hidden_size, dim=-1)), ended

    def _in_one_call(self, flat: Tensor, sizes: list[int], states: list[States], layers: list[Int8Linear]) -> bool:
        if (
            is_compiling()
            or flat.dtype != torch.float32
            or sizes[0] != sizes[-1]
            or not sizes[0]
            or (torch.is_grad_enabled() and flat.requires_grad)
        ):
            return False
        plain = all(layer.bias is None or layer.bias.dtype == torch.float32 for layer in layers)
        return (
            plain
            and all(layer.in_kernels(flat) for layer in layers)
            and all(state.dtype == torch.float32 for pair in states for state in pair)
        )
