"""What flows into linear layers, seen on calibration data: the largest value of each channel, and the scale that rounds all values best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.tracing import evaluating

_BINS = 8192
_CLIPS = 64  # scales tried: from the one that holds the largest value down to a tenth of it


def channel_maxima(module: nn.Module, names: Iterable[str], data: Calibration | None, doing: str) -> dict[str, Tensor]:
    """Return for each named layer the largest absolute value of each of its inputs, float32 (in_features,).

    Raises:
        TransformError: there is no data, a layer sees none of it, or NaN or infinity flows into one.
    """
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        most = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).float()
        found[name] = torch.maximum(found[name], most) if name in found else most

    watch_inputs(module, names, data, look, doing)
    for name, most in found.items():
        _refuse_non_finite(name, most)
    return found


def static_scales(module: nn.Module, names: Iterable[str], data: Calibration | None, doing: str) -> dict[str, float]:
    """Return for each named layer the one scale for its input that rounds the calibration data best; see ``Histogram.best_scale``.

    Raises:
        TransformError: there is no data, a layer sees none of it, or NaN or infinity flows into one.
    """
    found: dict[str, Histogram] = {}
    last: tuple[Tensor | None, Histogram] = None, Histogram()

    def look(name: str, x: Tensor) -> None:
        nonlocal last
        if last[0] is not x:  # layers that read one tensor share the counting
            _refuse_non_finite(name, x)
            last = x, Histogram.of(x)
        found.setdefault(name, Histogram()).add(last[1])

    watch_inputs(module, names, data, look, doing)
    return {name: histogram.best_scale() for name, histogram in found.items()}


@torch.no_grad()
def watch_inputs(
    module: nn.Module, names: Iterable[str], data: Calibration | None, look: Callable[[str, Tensor], None], doing: str
) -> None:
    """Run the module on all the data and show the input of each named layer to ``look`` at every call.

    Raises:
        TransformError: there is no data, or a layer never ran.
    """
    if data is None or not data.batches:
        raise TransformError(f"{doing} needs calibration data, and there is none")
    seen: set[str] = set()
    with evaluating(module), ExitStack() as stack:
        for name in (names := list(names)):

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                seen.add(name)
                look(name, args[0] if args else kwargs["input"])

            stack.callback(module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in data.batches:
            module(**batch)
    idle = [name for name in names if name not in seen]
    if idle:
        raise TransformError(f"{doing}: {idle[0]} saw no calibration data ({len(idle)} of {len(names)} layers); exclude such layers")


class Histogram:
    """How many absolute values fall into each of equal bins from 0 to a power of two that no value exceeds."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.top = 0.0
        self.most = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Return the histogram of finite values."""
        made = cls()
        sizes = values.detach().abs().float().flatten()
        made.most = float(sizes.max()) if sizes.numel() else 0.0
        if made.most > 0:
            made.top = 2.0 ** math.ceil(math.log2(made.most))
            made.counts = torch.histc(sizes, _BINS, 0, made.top).double().cpu()
        return made

    def add(self, other: Histogram) -> None:
        """Count all that another one has counted; zeros alone count nothing."""
        if not other.top:
            return
        top = max(self.top, other.top)
        self.counts = self._counts_up_to(top) + other._counts_up_to(top)
        self.top, self.most = top, max(self.most, other.most)

    def _counts_up_to(self, top: float) -> Tensor:
        counts, reached = self.counts, self.top
        while 0 < reached < top:
            counts = torch.cat((counts.view(-1, 2).sum(dim=1), counts.new_zeros(_BINS // 2)))
            reached *= 2
        return counts

    def best_scale(self) -> float:
        """Return the scale of the least squared error of round(x / scale) within -127..127, tried from max|x| / 127 down to a tenth.

        The values of a bin stand at its middle. With zeros alone the scale is 1.
        """
        if not self.top:
            return 1.0
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.top / _BINS)
        scales = self.most / 127 * torch.linspace(1, 0.1, _CLIPS, dtype=torch.float64)
        rounded = (middles / scales[:, None]).round_().clamp_(max=127).mul_(scales[:, None])
        errors = (rounded.sub_(middles).square_() * self.counts).sum(dim=1)
        return float(scales[int(errors.argmin())])


def _refuse_non_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise TransformError(f"{name}: NaN or infinity flows into this layer on calibration data; the model is broken before")
