"""What packed recurrent layers share: the walk over layers, directions and time. A subclass adds what one cell computes.

The input products of all time steps are one call of a kernel; the hidden products are one call a step.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from optkit.core.errors import TransformError
from optkit.kernels.guards import refuse_override
from optkit.kernels.int8 import Int8Linear

_FLOAT_NAME = re.compile(r"(weight|bias)_(ih|hh)_(l\d+(?:_reverse)?)")
States = tuple[Tensor, ...]


class PackedRecurrent(nn.RNNBase):
    """A recurrent layer over int8 weights: for each layer and direction one ``Int8Linear`` for the input and one for the hidden state.

    It takes no part in training: weights and biases get no gradient, the input does.
    """

    plain: ClassVar[type[nn.RNNBase]]
    gates: ClassVar[int]  # rows of a weight for each channel of the hidden state

    def __init__(
        self,
        linears: list[Int8Linear],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Take the linear layers in the order of ``places``, for each the one of the input and then the one of the hidden state."""
        nn.Module.__init__(self)  # not that of nn.RNNBase, which would make float weights
        self.mode = self.plain.__name__
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional, self.dropout, self.proj_size = bias, batch_first, bidirectional, dropout, 0
        names = [f"{part}_{place}" for place in places(num_layers, bidirectional) for part in ("input", "hidden")]
        for name, linear in zip(names, linears, strict=True):
            self.register_module(name, linear)

    @classmethod
    def from_plain(cls, layer: nn.RNNBase) -> Self:
        """Return the packed form of a plain recurrent layer.

        Raises:
            TransformError: it has a forward of its own or a projection (``proj_size``), or NaN or infinity among its weights.
        """
        refuse_recurrent(layer, cls.plain)
        linears = []
        for place in places(layer.num_layers, layer.bidirectional):
            for kind in ("ih", "hh"):
                weight, bias = (getattr(layer, f"{part}_{kind}_{place}", None) for part in ("weight", "bias"))
                linears.append(Int8Linear.from_weight(cast(Tensor, weight), bias))
        sizes = (layer.input_size, layer.hidden_size, layer.num_layers, layer.bias, layer.batch_first, layer.bidirectional)
        return cls(linears, *sizes, layer.dropout).train(layer.training)

    @classmethod
    def empty(cls, dtype: str = "float32", **sizes: Any) -> Self:
        """Return a layer of zeros, to load a state into; ``sizes`` are those of ``layout``."""
        directions, rows = 1 + sizes["bidirectional"], cls.gates * sizes["hidden_size"]
        linears = []
        for place in places(sizes["num_layers"], sizes["bidirectional"]):
            width = sizes["input_size"] if place in ("l0", "l0_reverse") else directions * sizes["hidden_size"]
            linears += [Int8Linear.empty(cols, rows, sizes["bias"], dtype) for cols in (width, sizes["hidden_size"])]
        return cls(linears, **sizes)

    def layout(self) -> dict[str, Any]:
        """Return the arguments of ``empty``."""
        sizes = {"input_size": self.input_size, "hidden_size": self.hidden_size, "num_layers": self.num_layers, "bias": self.bias}
        kind = str(self.input_l0.compute_dtype).removeprefix("torch.")
        ways = {"batch_first": self.batch_first, "bidirectional": self.bidirectional, "dropout": self.dropout, "dtype": kind}
        return sizes | ways

    def passes(self, flat: Tensor, sizes: list[int], states: list[States], names: list[str]) -> tuple[list[Tensor], list[States]]:
        """Go through time once for each of these places; return the outputs and the last states of each."""
        found = [self._pass(flat, sizes, state, name) for state, name in zip(states, names, strict=True)]
        return [output for output, _ in found], [state for _, state in found]

    @abstractmethod
    def cell(self, given: Tensor, product: Tensor, states: States) -> States:
        """Return the next states (b, hidden), the visible one first, from both products (b, gates * hidden) and the states before."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return outputs and last states as the plain layer does, for a batch, a single sequence or a ``PackedSequence``.

        Raises:
            RuntimeError: sizes that do not fit, or no time step at all.
            ValueError: an input of other than two or three dimensions.
        """
        if isinstance(input, PackedSequence):
            states = self._begin(hx, input.data, int(input.batch_sizes[0]), input.sorted_indices)
            output, last = self._run(input.data, input.batch_sizes.tolist(), states)
            sequence = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return sequence, self._told([_picked(state, input.unsorted_indices) for state in last])
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: expected input to be 2D or 3D, got {input.dim()}D instead")
        single, turned = input.dim() == 2, input.dim() == 3 and self.batch_first
        steps = input[:, None] if single else input.transpose(0, 1) if turned else input
        count, batch = steps.shape[:2]
        if hx is not None and single:
            hx = hx[:, None] if isinstance(hx, Tensor) else tuple(state[:, None] for state in hx)
        states = self._begin(hx, steps, batch, None)
        output, last = self._run(steps.flatten(0, 1), [batch] * count, states)
        output = output.view(count, batch, -1)
        output = output[:, 0] if single else output.transpose(0, 1) if turned else output
        return output, self._told([state[:, 0] for state in last] if single else last)

    def _begin(self, hx: Any, input: Tensor, batch: int, order: Tensor | None) -> States:
        """Return the states (layers * directions, batch, hidden) to begin with, in the order of the batch."""
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}")
        if not len(input):
            raise RuntimeError("the sequence has no time step")
        shape = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        number = 2 if self.plain is nn.LSTM else 1
        if hx is None:
            return tuple(input.new_zeros(shape) for _ in range(number))
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        for state in states:
            if len(states) != number or tuple(state.shape) != shape:
                raise RuntimeError(f"expected {number} states of size {shape}, got {[tuple(one.shape) for one in states]}")
        return tuple(_picked(state, order) for state in states)

    def _told(self, states: list[Tensor]) -> Any:
        return tuple(states) if len(states) > 1 else states[0]

    def _run(self, flat: Tensor, sizes: list[int], states: States) -> tuple[Tensor, list[Tensor]]:
        """Go through all layers over time steps that lie one after another: ``sizes`` says how many rows each has, never more later."""
        last: list[States] = []
        for layer in range(self.num_layers):
            names = list(places(self.num_layers, self.bidirectional))[len(last) : len(last) + 1 + self.bidirectional]
            begun = [tuple(one[len(last) + direction] for one in states) for direction in range(len(names))]
            outputs, ended = self.passes(flat, sizes, begun, names)
            last += ended
            flat = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                flat = functional.dropout(flat, self.dropout, self.training)
        return flat, [torch.stack(parts) for parts in zip(*last, strict=True)]

    def _pass(self, flat: Tensor, sizes: list[int], states: States, place: str) -> tuple[Tensor, States]:
        """Go through time once. A sequence that has ended keeps its last state, one that has not begun its first."""
        given = self.get_submodule(f"input_{place}")(flat)
        product = _steady(cast(Int8Linear, self.get_submodule(f"hidden_{place}")), flat)
        steps = list(zip(sizes, accumulate(sizes), strict=True))
        backwards = place.endswith("_reverse")
        outputs = []
        for count, end in reversed(steps) if backwards else steps:
            present = tuple(state[:count] for state in states)
            new = self.cell(given[end - count : end], product(present[0]), present)
            outputs.append(new[0])
            waiting = len(states[0]) > count
            states = tuple(torch.cat((one, old[count:])) for one, old in zip(new, states, strict=True)) if waiting else new
        return torch.cat(outputs[::-1] if backwards else outputs), states

    def flatten_parameters(self) -> None:
        """Do nothing: there are no float weights whose place in memory matters."""

    @property
    def all_weights(self) -> list[list[Any]]:
        """The dequantized weights and the biases of each layer and direction, as the plain layer lists them."""
        kinds = [f"{part}_{kind}" for part in (("weight", "bias") if self.bias else ("weight",)) for kind in ("ih", "hh")]
        return [[getattr(self, f"{kind}_{place}") for kind in kinds] for place in places(self.num_layers, self.bidirectional)]

    def __getattr__(self, name: str) -> Any:
        found = _FLOAT_NAME.fullmatch(name)
        if found is None:
            return super().__getattr__(name)
        part, kind, place = found.groups()
        return getattr(self.get_submodule(f"{'input' if kind == 'ih' else 'hidden'}_{place}"), part)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)
        return self


def places(num_layers: int, bidirectional: bool) -> Iterator[str]:
    """Yield the name of each layer and direction, as PyTorch ends the names of its weights: ``l0``, ``l0_reverse``, ``l1``, ..."""
    for layer in range(num_layers):
        yield f"l{layer}"
        if bidirectional:
            yield f"l{layer}_reverse"


def refuse_recurrent(layer: nn.RNNBase, kind: type[nn.RNNBase]) -> None:
    """Refuse a recurrent layer that has no packed form.

    Raises:
        TransformError: it has a forward of its own, or a projection.
    """
    refuse_override(layer, kind)
    if layer.proj_size:
        raise TransformError(f"a {kind.__name__} with a projection (proj_size {layer.proj_size}) has no packed form; exclude this layer")


def _picked(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def _steady(layer: Int8Linear, like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product with a layer's weight for many calls: where no kernel takes inputs like this one, it is dequantized just once."""
    if layer.in_kernels(like):
        return layer
    weight, bias = layer.dequantize(like.dtype), None if layer.bias is None else layer.bias.to(like.dtype)
    return lambda state: functional.linear(state, weight, bias)
