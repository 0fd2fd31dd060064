"""How much the units of a layer matter: by their weights, by what they carry, or by their first-order effect on the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.layers import weight_of
from optkit.transforms.moments import Moments
from optkit.transforms.prune.dimensions import Place
from optkit.transforms.tracing import evaluating


def by_units(values: Tensor, place: Place, units: int) -> Tensor:
    """Sum values (entries,) of a place's dimension over the entries of each unit; return (units,)."""
    owners = torch.cat([torch.arange(units).repeat_interleave(segment.each) for segment in place.segments])
    return torch.zeros(units).index_add_(0, owners, values.float()[place.entries(torch.arange(units))])


@torch.no_grad()
def magnitude(module: nn.Module, places: Sequence[Place], units: int) -> Tensor:
    """Return the sum of squares of all weights that belong to a unit (units,): rows that make it and columns that read it."""
    total = torch.zeros(units)
    for place in places:
        parameter = module.get_submodule(place.layer).get_parameter(place.parameter).detach().float()
        others = [dim for dim in range(parameter.ndim) if dim != place.dim]
        total += by_units(parameter.square().sum(others) if others else parameter.square(), place, units)
    return total


@torch.no_grad()
def activation(module: nn.Module, reader: Place, seen: Moments, units: int) -> Tensor:
    """Return the mean square of what each unit adds to the outputs of the layer that reads it (units,).

    It is |W_j|^2 E[x_j^2], summed over the inputs j of the unit: Wanda's score in squares, for whole columns (as in FLAP, An et al.
    2023, arXiv 2312.11983).
    """
    columns = weight_of(module.get_submodule(reader.layer)).float().square().sum(0)
    return by_units(columns * seen.gram.diagonal(), reader, units)


def taylor(module: nn.Module, data: Calibration, readers: Iterable[Place], units: int) -> dict[str, Tensor]:
    """Return by layer the mean square, over batches, of the loss's first-order change when a unit is silenced (units,).

    The change is the sum of w * dL/dw over the weights that read the unit (Molchanov et al. 2019, arXiv 1906.10771); L is the cross
    entropy of the next token.

    Raises:
        TransformError: the model predicts no next token.
    """
    places = {place.layer: place for place in readers}
    found = {name: torch.zeros(units) for name in places}
    parameters = {name: module.get_submodule(name).get_parameter("weight") for name in places}
    asking = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with evaluating(module), torch.enable_grad():
            for batch in data.batches:
                gradients = torch.autograd.grad(_next_token_loss(module, batch), list(parameters.values()))
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    place = places[name]
                    change = (parameter.detach().float() * gradient.float()).sum(1 - place.dim)
                    found[name] += by_units(change, place, units).square() / len(data.batches)
    finally:
        for parameter, asked in asking.items():
            parameter.requires_grad_(asked)
    return found


def loudness(module: nn.Module, data: Calibration, layers: Iterable[str], most_bytes: int = 2**31) -> dict[str, Tensor]:
    """Return by layer the mean of g g^T for the gradients g = dL/dy of its outputs (out, out): how much the loss hears of an error there.

    Where all of them would take more than ``most_bytes``, the widest layers get the diagonal alone (out,).

    Raises:
        TransformError: the model predicts no next token.
    """
    found: dict[str, Tensor] = {}
    whole = _whole(module, layers, most_bytes)
    positions = 0
    asking = {parameter: parameter.requires_grad for parameter in module.parameters()}

    def hook(name: str) -> Any:
        def listen(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            def hear(gradient: Tensor) -> None:
                flat = gradient.detach().float().flatten(0, -2)
                squares = flat.T @ flat if whole[name] else flat.square().sum(0)
                found[name] = found[name].add_(squares) if name in found else squares

            output.register_hook(hear)
            return output

        return listen

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in whole]
    try:
        for number, parameter in enumerate(asking):
            parameter.requires_grad_(number == 0 or parameter.ndim == 1)  # enough for every output to have a gradient
        with evaluating(module), torch.enable_grad():
            for batch in data.batches:
                loss = _next_token_loss(module, batch)
                positions += batch["input_ids"].numel()
                (loss * batch["input_ids"].numel()).backward()
                for parameter in asking:
                    parameter.grad = None
    finally:
        for handle in handles:
            handle.remove()
        for parameter, asked in asking.items():
            parameter.requires_grad_(asked)
    return {name: squares.div_(max(1, positions)) for name, squares in found.items()}


def _whole(module: nn.Module, layers: Iterable[str], most_bytes: int) -> dict[str, bool]:
    """Say for each layer whether the moments of its outputs fit beside those of all narrower ones."""
    widths = {name: weight_of(module.get_submodule(name)).shape[0] for name in layers}
    chosen, used = {}, 0
    for name, width in sorted(widths.items(), key=lambda item: item[1]):
        used += 4 * width**2
        chosen[name] = used <= most_bytes
    return chosen


def predicts_tokens(module: nn.Module, data: Calibration) -> bool:
    """Say whether the loss of the next token can be taken on this data."""
    generates = getattr(module, "can_generate", None)
    return callable(generates) and bool(generates()) and all("input_ids" in batch for batch in data.batches)


def _next_token_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    ids = batch.get("input_ids")
    logits = getattr(module(**batch), "logits", None)
    if ids is None or not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] <= int(ids.max()):
        raise TransformError(f"{type(module).__name__} predicts no next token, so there is no loss to follow; use importance: activation")
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
