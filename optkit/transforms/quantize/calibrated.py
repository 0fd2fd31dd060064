"""The int4 methods that look at data, block by block: awq and gptq over one walk through the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from optkit.core.errors import OptkitWarning, TransformError
from optkit.core.subject import Calibration
from optkit.kernels.clipping import SHRINKS, search, search_symmetric
from optkit.kernels.guards import refuse_non_finite
from optkit.kernels.int4 import Int4Linear, dequantize_groups, quantize_groups
from optkit.transforms.layers import replace_layer, weight_of
from optkit.transforms.moments import Moments, by_blocks
from optkit.transforms.quantize.awq import activation_scale
from optkit.transforms.quantize.folding import Fold, apply_fold, folds, shared
from optkit.transforms.quantize.gptq import gptq, importance_of
from optkit.transforms.quantize.packing import bias_of

Packed = tuple[Tensor, Tensor, Tensor]
_TOKENS = 12


class Format(NamedTuple):
    """How groups are formed: ``group_size`` of None is one group a row."""

    group_size: int | None
    symmetric: bool

    def size(self, weight: Tensor) -> int:
        """Return the columns in a group of this weight (out, in)."""
        return self.group_size or weight.shape[1]


def pack_calibrated(
    module: nn.Module, names: Sequence[str], data: Calibration, method: Literal["awq", "gptq"], form: Format, act_order: bool
) -> None:
    """Replace the named linear layers by packed ones, in place. Layers that no data reaches are rounded to nearest, with a warning.

    Raises:
        TransformError: a weight or an input is not finite; or, for awq, no scale can move anywhere.
    """
    for name in names:
        _by_name(name, refuse_non_finite, weight_of(module.get_submodule(name)))
    found: dict[str, Packed] = {}
    places = _places(module, names, data) if method == "awq" else []

    def work(moments: Mapping[str, Moments]) -> None:
        for fold in places:
            here = [name for name in fold.consumers if name in moments]
            if here:
                _scale(module, fold, here, moments[here[0]], form)
        for together in _sharing(moments):
            seen, weights = moments[together[0]], [weight_of(module.get_submodule(name)) for name in together]
            whole, size = torch.cat(weights), form.size(weights[0])
            if method == "gptq":
                made = _by_name(together[0], gptq, whole, seen.gram, size, form.symmetric, act_order)
            else:
                made = _by_name(together[0], quantize_groups, whole, size, True, form.symmetric, importance_of(seen.gram.diagonal()))
            parts = zip(*(tensor.split([len(weight) for weight in weights]) for tensor in made), strict=True)
            for name, weight, (q, scale, point) in zip(together, weights, parts, strict=True):
                found[name] = (q.clone(), scale.clone(), point.clone())
                weight.copy_(dequantize_groups(*found[name]))  # so that the blocks to come see what this one will answer

    by_blocks(module, data, names, work)
    missed = [name for name in names if name not in found]
    if missed:
        warnings.warn(f"{method}: no calibration data reached {_listed(missed, names)}; rounded to nearest", OptkitWarning, stacklevel=2)
    for name in names:
        layer = module.get_submodule(name)
        weight = weight_of(layer)
        tensors = found.pop(name, None) or quantize_groups(weight, form.size(weight), True, form.symmetric)
        replace_layer(module, name, Int4Linear(tensors, bias_of(layer), form.size(weight), weight.dtype).train(layer.training))


def _sharing(moments: Mapping[str, Moments]) -> list[list[str]]:
    """Return the layers in groups that read one input: what is known of it is worked out once for all their rows."""
    groups: dict[int, list[str]] = {}
    for name, seen in moments.items():
        groups.setdefault(id(seen), []).append(name)
    return list(groups.values())


def _places(module: nn.Module, names: Sequence[str], data: Calibration) -> list[Fold]:
    """Return the folds whose consumers are to be quantized, and tell which layers have none."""
    first = data.batches[0]
    tokens = _TOKENS if set(first) == {"input_ids"} else None  # a short sequence will do, where nothing else has its length
    batch = {name: tensor[:1][:, :tokens] if tokens else tensor[:1] for name, tensor in first.items()}
    places = [fold for fold in folds(module, batch) if any(name in names for name in fold.consumers)]
    if not places:
        raise TransformError(
            f"awq finds no norm or linear layer in {type(module).__name__} that could take a scale from the layers after it; "
            "use method gptq or hqq"
        )
    without = [name for name in names if not any(name in fold.consumers for fold in places)]
    if without:
        warnings.warn(
            f"awq: nothing can take a scale from {_listed(without, names)}; rounded to nearest without one", OptkitWarning, stacklevel=3
        )
    return places


def _scale(module: nn.Module, fold: Fold, names: Sequence[str], moments: Moments, form: Format) -> None:
    weights = [weight_of(module.get_submodule(name)) for name in names]
    scale, _ = activation_scale(weights, moments.gram, moments.magnitude, partial(_rounded, form=form), partial(shared, fold))
    apply_fold(module, fold, scale)
    moments.divide(scale)


def _rounded(weight: Tensor, squares: Tensor, form: Format) -> Tensor:
    size = form.size(weight)
    find = search_symmetric if form.symmetric else search
    made = find(weight.reshape(len(weight), -1, size), SHRINKS, importance_of(squares).reshape(-1, size))
    return ((made.numbers - made.point.float()[..., None]) * made.scale.float()[..., None]).flatten(1)


def _by_name(name: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and name the layer in what it refuses."""
    try:
        return make(*arguments)
    except TransformError as error:
        raise TransformError(f"{name}: {error}") from None


def _listed(some: Sequence[str], every: Sequence[str]) -> str:
    return f"{len(some)} of {len(every)} layers ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
