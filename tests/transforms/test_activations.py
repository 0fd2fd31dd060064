"""What calibration data tells about the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.kernels.w8a8 import quantize_tokens
from optkit.transforms.quantize.activations import Histogram, channel_maxima, static_scales

Mlp = Callable[[], nn.Module]


def data_of(*inputs: Tensor) -> Calibration:
    return Calibration(tuple({"input": x} for x in inputs))


def error_of(x: Tensor, scale: float) -> float:
    q, _ = quantize_tokens(x[None], torch.tensor([scale]))
    return float((q.double() * scale - x.double()).square().sum())


def test_the_largest_value_of_each_channel_over_all_batches_is_found(mlp: Mlp) -> None:
    module, first, second = mlp(), torch.randn(5, 64), torch.randn(2, 3, 64)
    found = channel_maxima(module, ["0", "2"], data_of(first, second), "it")
    every = torch.cat((first, second.reshape(-1, 64)))
    torch.testing.assert_close(found["0"], every.abs().amax(dim=0), rtol=0, atol=0)
    torch.testing.assert_close(found["2"], module[1](module[0](every)).abs().amax(dim=0))  # type: ignore[index]
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_the_best_scale_is_about_as_good_as_the_best_of_many_tried_one_by_one(power: int, size: float) -> None:
    values = torch.randn(20_000) ** power * size
    histogram = Histogram()
    for part in values.split(7_000):
        histogram.add(Histogram.of(part))
    tried = [float(values.abs().max()) / 127 * share for share in torch.linspace(1, 0.1, 200).tolist()]
    assert error_of(values, histogram.best_scale()) <= 1.02 * min(error_of(values, scale) for scale in tried)


def test_a_histogram_counts_every_value_however_the_range_grows() -> None:
    histogram = Histogram()
    for part in (torch.zeros(3), torch.tensor([0.1, -0.2]), torch.tensor([1000.0]), torch.tensor([0.3])):
        histogram.add(Histogram.of(part))
    assert histogram.counts.sum() == 4
    assert histogram.top == 1024
    assert histogram.counts.nonzero().flatten().tolist() == [0, 1, 2, 8000]


def test_one_outlier_in_a_hundred_thousand_is_cut_off_and_a_flat_range_is_kept() -> None:
    outlier = Histogram.of(torch.cat((torch.randn(100_000), torch.tensor([20.0]))))
    flat = Histogram.of(torch.rand(100_000))
    assert outlier.best_scale() < 0.7 * 20 / 127
    assert flat.best_scale() > 0.98 / 127


def test_zeros_alone_have_the_scale_one() -> None:
    for values in (torch.zeros(10), torch.zeros(0)):
        assert Histogram.of(values).best_scale() == 1.0


def test_without_data_a_layer_out_of_use_and_broken_inputs_are_refused_by_name(mlp: Mlp) -> None:
    module = mlp()
    for empty in (None, Calibration()):
        with pytest.raises(TransformError, match="it needs calibration data, and there is none"):
            static_scales(module, ["0"], empty, "it")
    module.register_module("idle", nn.Linear(4, 4))
    module.forward = lambda input: module[0](input)  # type: ignore[method-assign,assignment,index]
    with pytest.raises(TransformError, match=r"it: idle saw no calibration data \(1 of 2 layers\); exclude such layers"):
        static_scales(module, ["0", "idle"], data_of(torch.randn(2, 64)), "it")
    for look in (static_scales, channel_maxima):
        with pytest.raises(TransformError, match=r"^0: NaN or infinity flows into this layer"):
            look(mlp(), ["0"], data_of(torch.full((2, 64), torch.nan)), "it")
