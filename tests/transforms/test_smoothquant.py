"""Outliers that move from activations into weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.transforms import Int8, Plan, Smoothquant
from optkit.transforms.quantize.activations import channel_maxima
from optkit.transforms.quantize.smoothquant import smoothing_scale

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture
def spiky(subject: Subjects) -> Callable[[], Subject]:
    """Return a function that makes a model with outliers: a few channels behind each norm are fifty times as large as the others."""

    def build() -> Subject:
        whole = subject(3)
        with torch.no_grad():
            for block in whole.module.model.layers:  # type: ignore[union-attr]
                for norm in (block.input_layernorm, block.post_attention_layernorm):
                    norm.weight[::16] *= 50  # type: ignore[index]
                for layer in (
                    block.self_attn.q_proj,
                    block.self_attn.k_proj,
                    block.self_attn.v_proj,
                    block.mlp.gate_proj,
                    block.mlp.up_proj,
                ):
                    layer.weight[:, ::16] /= 50  # type: ignore[index,union-attr]
        return whole

    return build


def error_of(packed: nn.Module, dense: nn.Module, logits: Logits) -> float:
    exact = logits(dense)
    return float((logits(packed) - exact).norm() / exact.norm())


@pytest.mark.parametrize("through", ["norms", "all"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_answers_stay_and_the_weights_do_not(
    subject: Subjects, calibration: Calibration, logits: Logits, alpha: float, through: str
) -> None:
    smooth = Smoothquant(alpha=alpha, through=through).apply(subject(3), calibration).module  # type: ignore[arg-type]
    fresh = subject(3).module
    torch.testing.assert_close(logits(smooth), logits(fresh), rtol=1e-3, atol=1e-3)
    moved = {name for name, tensor in smooth.state_dict().items() if not torch.equal(tensor, fresh.state_dict()[name])}
    block = {name.removeprefix("model.layers.1.") for name in moved if name.startswith("model.layers.1.")}
    behind_norms = {
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}_proj" for name in "qkv"),
        "mlp.gate_proj",
        "mlp.up_proj",
    }
    assert block == {f"{name}.weight" for name in behind_norms | ({"self_attn.o_proj", "mlp.down_proj"} if through == "all" else set())}
    assert not any("embed" in name or "lm_head" in name for name in moved)


def test_the_scale_follows_the_law_of_the_paper() -> None:
    ranges, weights = torch.rand(7) + 0.1, [torch.randn(5, 7), torch.randn(3, 7)]
    most = torch.cat(weights).abs().amax(dim=0)
    for alpha in (0.0, 0.3, 1.0):
        expected = ranges.double() ** alpha / most.double() ** (1 - alpha)
        torch.testing.assert_close(smoothing_scale(ranges, weights, alpha).double(), expected, rtol=1e-5, atol=0)
    even = smoothing_scale(ranges, weights, 0.5)
    torch.testing.assert_close(ranges / even, most * even)  # half way, both sides reach equally far


def test_silent_channels_and_dead_columns_have_positive_scales() -> None:
    weight = torch.randn(4, 6)
    weight[:, 2] = 0
    for ranges, matrix in ((torch.tensor([0.0, 1, 2, 3, 4, 5]), weight), (torch.zeros(6), torch.zeros(4, 6))):
        for alpha in (0.0, 0.5, 1.0):
            scale = smoothing_scale(ranges, [matrix], alpha)
            assert torch.isfinite(scale).all() and (scale > 0).all()


def test_the_ranges_of_channels_come_closer_together(spiky: Callable[[], Subject], calibration: Calibration) -> None:
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    before = channel_maxima(spiky().module, names, calibration, "it")
    after = channel_maxima(Smoothquant().apply(spiky(), calibration).module, names, calibration, "it")
    for name in names:
        assert after[name].max() / after[name].median() < 0.3 * before[name].max() / before[name].median()


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_int8_activations_lose_less_after_it_where_there_are_outliers(
    spiky: Callable[[], Subject], calibration: Calibration, logits: Logits, activations: str
) -> None:
    step = Int8(activations=activations)  # type: ignore[arg-type]
    plain = error_of(step.apply(spiky(), calibration).module, spiky().module, logits)
    smooth = error_of(step.apply(Smoothquant().apply(spiky(), calibration), calibration).module, spiky().module, logits)
    assert smooth < 0.6 * plain


def test_the_smoothed_model_opens_in_plain_transformers(
    subject: Subjects, calibration: Calibration, logits: Logits, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    smooth = Smoothquant().apply(subject(), calibration)
    assert (smooth.opens_in, smooth.history[-1].execution) == ("transformers", "neutral")
    optkit.save(smooth, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), logits(smooth.module))


def test_layers_that_share_an_input_stay_when_one_of_them_is_excluded(subject: Subjects, calibration: Calibration) -> None:
    smooth = Smoothquant(targets=Targets(exclude=("k_proj",))).apply(subject(), calibration).module
    fresh = subject().module.state_dict()
    moved = {name for name, tensor in smooth.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved and not any("self_attn" in name or "input_layernorm" in name for name in moved)


def test_without_data_or_without_a_place_or_a_match_it_is_refused(subject: Subjects, mlp: Callable[[], nn.Module]) -> None:
    assert Smoothquant().needs_data
    for data in (None, Calibration()):
        with pytest.raises(TransformError, match="smoothquant needs calibration data, and there is none"):
            Smoothquant().apply(subject(), data)
    with pytest.raises(TransformError, match="smoothquant finds no place in Sequential where a scale can move"):
        Smoothquant().apply(mlp(), Calibration(({"input": torch.randn(8, 64)},)))
    with torch.device("meta"), pytest.raises(TargetError, match="matches none of the"):
        Smoothquant(targets=Targets(include=("nothing",))).check(Plan(subject()))


def test_a_plain_network_with_a_norm_is_smoothed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    x = torch.randn(8, 64) * torch.logspace(-1, 1, 64)
    with torch.no_grad():
        before, weight = module(x), module[1].weight.clone()
        Smoothquant().apply(module, Calibration(({"input": x},)))
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(module[1].weight, weight)
