"""A packed ``nn.LSTM``: weight-only int8. Where there are kernels, one call goes through all time steps of both directions."""

from __future__ import annotations

import ctypes
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from optkit.kernels.int8 import Int8Linear
from optkit.kernels.recurrent import PackedRecurrent, States

_MANY = 8  # sequences, from which on products are bound by arithmetic; and steps, over which making floats of the weights pays


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
        if min(sizes[0], len(sizes)) >= _MANY and sizes[0] == sizes[-1] and flat.is_cpu and not is_compiling():
            return self._by_floats(flat, sizes, states, names)
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

    def _by_floats(self, flat: Tensor, sizes: list[int], states: list[States], names: list[str]) -> tuple[list[Tensor], list[States]]:
        """Go through time by PyTorch's own layer, with weights that are floats for so long: where rows are many, reading costs little."""
        weights: list[Tensor] = []
        for name in names:
            parts = [cast(Int8Linear, self.get_submodule(f"{part}_{name}")) for part in ("input", "hidden")]
            weights += [part.dequantize(flat.dtype) for part in parts]
            weights += [part.bias.to(flat.dtype) for part in parts if part.bias is not None]
        begun = tuple(torch.stack([state[kind] for state in states]).to(flat.dtype) for kind in range(2))
        steps = flat.view(len(sizes), sizes[0], -1)
        output, visible, held = torch._VF.lstm(steps, begun, weights, self.bias, 1, 0.0, False, len(names) > 1, False)
        return list(output.flatten(0, 1).split(self.hidden_size, dim=-1)), list(zip(visible, held, strict=True))

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
