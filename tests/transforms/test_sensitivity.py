"""How far answers move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.quantize.sensitivity import Probe, few_rows

Llama = Callable[..., nn.Module]


def test_the_distance_of_logits_is_the_mean_divergence_in_nats(tiny_llama: Llama, calibration: Calibration) -> None:
    module = tiny_llama().train()
    probe = Probe(module, calibration, 1)
    assert probe.distance() == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        before = [module(**batch).logits.double() for batch in calibration.batches]
        module.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.3)  # type: ignore[operator,union-attr]
        now = [module(**batch).logits.double() for batch in calibration.batches]
    expected = [
        functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        for a, b in zip(before, now, strict=True)
    ]
    assert probe.distance() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert module.training


def test_the_distance_of_other_answers_is_their_relative_squared_error(mlp: Callable[[], nn.Module]) -> None:
    module, x = mlp(), torch.randn(16, 64)
    probe = Probe(module, Calibration(({"input": x},)), 1)
    with torch.no_grad():
        before = module(x)
        module.get_submodule("4").weight.mul_(1.1)  # type: ignore[operator,union-attr]
        expected = (module(x) - before).square().sum() / before.square().sum()
    assert probe.distance() == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) == pytest.approx(0.01, rel=1e-3)


def test_a_model_whose_answers_are_broken_before_is_refused(mlp: Callable[[], nn.Module]) -> None:
    with pytest.raises(TransformError, match="hold NaN or infinity before anything is rounded"):
        Probe(mlp(), Calibration(({"input": torch.full((2, 64), torch.nan)},)), 1)


def test_rows_are_spread_over_all_batches_and_cut_only_where_one_is_too_long() -> None:
    def rows(tokens: int) -> list[Tensor]:
        batches = tuple({"input_ids": torch.arange(8).view(2, 4) + 8 * number} for number in range(3))
        return [row["input_ids"] for row in few_rows(batches, tokens)]

    assert [row[0, 0].item() for row in rows(100)] == [0, 4, 8, 12, 16, 20]
    assert [row[0, 0].item() for row in rows(12)] == [0, 8, 20]
    assert [row.tolist() for row in rows(3)] == [[[0, 1, 2]]]
    named = few_rows(({"pixels": torch.randn(5, 3, 2), "labels": torch.arange(5)},), 3)
    assert [row["labels"].tolist() for row in named] == [[0], [2], [4]] and named[0]["pixels"].shape == (1, 3, 2)


def test_a_larger_model_and_more_runs_see_fewer_tokens(tiny_llama: Llama) -> None:
    data = Calibration(({"input_ids": torch.randint(2, 96, (16, 64))},))
    module = tiny_llama()
    size = sum(parameter.numel() for parameter in module.parameters())
    assert len(Probe(module, data, 1)._batches) == 16
    assert len(Probe(module, data, int(3e12 / (2 * size * 256)))._batches) == 4
    assert len(Probe(module, data, 10**12)._batches) == 1
