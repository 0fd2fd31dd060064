"""The sizes of layers that were changed one by one, where no configuration tells them: an artefact does, and they are made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import ArtefactError

_KINDS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase, nn.PReLU)


def sizes_of(module: nn.Module, plain: nn.Module | None) -> dict[str, Any]:
    """Return the numbers and shapes of layers, by name.

    Args:
        module: what is saved.
        plain: the same model as its configuration describes it, on the meta device; only layers that differ from it are told then.
    """
    found = {}
    as_described = dict(plain.named_modules()) if plain is not None else {}
    for name, layer in module.named_modules():
        if not _is_dense(layer):
            continue
        sizes = {"numbers": _numbers(layer), "shapes": _shapes(layer)}
        if plain is None or (name in as_described and _shapes(as_described[name]) != sizes["shapes"]):
            found[name] = sizes
    return found


def resize(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give layers the sizes that were saved; their weights are still to be read.

    Raises:
        ArtefactError: there is no such layer.
    """
    for name, entry in sizes.items():
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            raise ArtefactError(f"the artefact does not fit its own structure: {type(module).__name__} has no layer {name!r}") from None
        if not _is_dense(layer):
            continue
        for key, value in entry["numbers"].items():
            if _is_number(vars(layer).get(key)):
                setattr(layer, key, tuple(value) if isinstance(value, list) else value)
        for key, tensor in _own(layer).items():
            shape = entry["shapes"].get(key, list(tensor.shape))
            if list(tensor.shape) != shape:
                empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                setattr(layer, key, nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty)


def _is_dense(layer: nn.Module) -> bool:
    """Say whether a layer is one of PyTorch's own, or transformers' Conv1D: packed ones tell their sizes, and others cannot be guessed."""
    place = type(layer).__module__
    return (isinstance(layer, _KINDS) and place.startswith("torch.nn.")) or place == "transformers.pytorch_utils"


def _numbers(layer: nn.Module) -> dict[str, int | list[int]]:
    found = {key: value for key, value in vars(layer).items() if _is_number(value) and not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _is_number(value: Any) -> bool:
    """Say whether this is a whole number, or a tuple of some, as the shape of a norm is."""
    return type(value) is int or (isinstance(value, tuple) and bool(value) and all(type(one) is int for one in value))


def _own(layer: nn.Module) -> dict[str, Tensor]:
    return dict((*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)))


def _shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in _own(layer).items()}
