"""One small forward pass, followed: which linear layer read which tensor, and which layer made it. No list of architectures is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.transforms.layers import linear_layers


class Trace:
    """One forward pass: which linear layer read which tensor, which norm or linear layer made it, and the answer."""

    def __init__(self, module: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.linears = {name: layer for name, layer in linear_layers(module).items() if _is_own(module, layer)}
        norms = {name: layer for name, layer in module.named_modules() if _is_norm(layer)}
        self.order: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}  # kept alive, so that no address is given twice
        self.outputs: dict[str, Tensor] = {}
        calls: list[str] = []
        with ExitStack() as stack:
            for name, layer in {**self.linears, **norms}.items():

                def hook(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if args and isinstance(output, Tensor):
                        calls.append(name)
                        self.inputs[name], self.outputs[name] = args[0], output

                stack.callback(layer.register_forward_hook(hook).remove)
            self.answer = answer_of(module, batch)
        once = [name for name in calls if calls.count(name) == 1]
        self.order = {name: place for place, name in enumerate(once)}
        self.linears = {name: self.linears[name] for name in once if name in self.linears}
        self.norms = [name for name in once if name in norms]

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Say whether two tensors of this pass are one, or views of one with the same last axis."""
        return one.data_ptr() == other.data_ptr() and one.shape[-1] == other.shape[-1] and one.numel() == other.numel()


def some_tokens(module: nn.Module) -> Mapping[str, Tensor]:
    """Return twelve token ids for a language model.

    Raises:
        TransformError: it is none.
    """
    known = getattr(getattr(module, "config", None), "vocab_size", None)
    if not isinstance(known, int):
        raise TransformError(f"{type(module).__name__} is no language model: to follow its tensors a batch of its inputs is needed")
    return {"input_ids": torch.randint(0, known, (1, 12), generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def answer_of(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the first tensor that the module answers with: logits, or hidden states."""
    output = module(**batch)
    if isinstance(output, Tensor):
        return output
    first = output["logits"] if isinstance(output, Mapping) and "logits" in output else output[0]
    if not isinstance(first, Tensor):
        raise TransformError(f"{type(module).__name__} answers with {type(first).__name__}, not with a tensor")
    return first


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set the module to evaluation, and every layer back afterwards."""
    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def _is_norm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and "norm" in type(layer).__name__.lower() and not list(layer.children())


def _is_own(module: nn.Module, layer: nn.Module) -> bool:
    """Say whether a layer has a weight that is a parameter and no other layer's."""
    weight = layer._parameters.get("weight")
    return weight is not None and sum(other._parameters.get("weight") is weight for other in module.modules()) == 1
