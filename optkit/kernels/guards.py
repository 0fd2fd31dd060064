"""What packing refuses, with the reason and the way out, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError

_CHUNK = 1 << 20  # weights looked at in one go: they stay in the cache, and a large layer needs no copy of it in float32


def row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """Yield a matrix in bands of rows, each a new float32 tensor of a bounded size."""
    band = max(1, _CHUNK // max(1, weight.shape[1]))
    for rows in torch.split(weight, band):
        yield rows.float()


def refuse_non_matrix(weight: Tensor) -> None:
    """Refuse a weight that is not a float matrix with at least one element.

    Raises:
        TransformError: it has other than two dimensions, is empty, or holds integers.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise TransformError(f"a weight of shape {tuple(weight.shape)} in {weight.dtype} cannot be packed: it is no float matrix (out, in)")


def refuse_non_finite(scale: Tensor) -> None:
    """Refuse scales that NaN or infinity among the weights have spoiled. Tensors without values (meta) pass.

    Raises:
        TransformError: a row is spoiled; the message says how many and names the first.
    """
    if scale.is_meta:
        return
    wrong = (~torch.isfinite(scale)).reshape(scale.shape[0], -1).any(dim=1).nonzero()
    if len(wrong):
        raise TransformError(f"the weight holds NaN or infinity in {len(wrong)} of {scale.shape[0]} rows, first in row {int(wrong[0])}")


def refuse_override(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Refuse a layer with a forward of its own, which a packed layer would drop.

    Raises:
        TransformError: the class of the layer overrides ``forward`` of ``kind``.
    """
    if type(layer).forward is not kind.forward:
        name = type(layer).__name__
        raise TransformError(f"{name} is a {kind.__name__} with a forward of its own, which packing would lose; exclude this layer")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name such as ``float32``.

    Raises:
        TransformError: it is no floating-point dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TransformError(f"{name!r} is no floating-point dtype; use float32, bfloat16 or float16")
    return found
