"""Networks of any kind with fewer channels: really fewer products, the answers of the old shape, and open again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import optkit
from optkit.core.errors import OptkitWarning, TargetError, TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.models.networks.bilstm import BilstmClassifier
from optkit.models.networks.lstm_forecaster import LstmForecast
from optkit.transforms import Int8, PruneChannels


class Residual(nn.Module):
    """Convolutions with statistics and a way around them, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.one, self.one_norm = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.two, self.two_norm = nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.two_norm(self.two(self.one_norm(self.one(x)).relu()))).relu()
        found: Tensor = self.classify(x.mean((2, 3)))
        return found


class Reader(nn.Module):
    """An LSTM over numbers, and a linear answer from its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.answer = nn.Linear(6, 32), nn.LSTM(32, 48, batch_first=True), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.answer(self.lstm(self.embed(x).relu())[0][:, -1])
        return found


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


NETWORKS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "convolutional": (Residual, {"x": torch.randn(2, 3, 12, 12)}),
    "perceptron": (perceptron, {"input": torch.randn(2, 40)}),
    "recurrent": (Reader, {"x": torch.randn(2, 7, 6)}),
}


def products(module: nn.Module, batch: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**batch)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NETWORKS)
def test_there_are_fewer_products_and_weights_and_answers_of_the_old_shape(name: str) -> None:
    make, batch = NETWORKS[name]
    whole, pruned = make().eval(), PruneChannels(ratio=0.5).apply(make(), Calibration((batch,))).eval()
    assert pruned(**batch).shape == whole(**batch).shape
    weights = [sum(parameter.numel() for parameter in module.parameters()) for module in (whole, pruned)]
    assert weights[1] < 0.55 * weights[0]
    if name != "recurrent":  # which the counter does not know
        assert products(pruned, batch) < 0.55 * products(whole, batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_saved_and_opened_into_a_fresh_network_with_equal_answers(name: str, tmp_path: Path) -> None:
    make, batch = NETWORKS[name]
    pruned = PruneChannels(ratio=0.5).apply(make(), Calibration((batch,))).eval()
    optkit.save(pruned, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved", into=make()).module
    with torch.no_grad():
        assert torch.equal(again(**batch), pruned(**batch))


def test_channels_that_are_all_zero_go_first_and_are_not_missed() -> None:
    module, batch = perceptron().eval(), NETWORKS["perceptron"][1]
    module[2] = nn.Identity()
    with torch.no_grad():
        module[0].weight[1::2], module[0].bias[1::2], module[3].weight[:, 1::2] = 0, 0, 0
        module[3].weight[::2], module[3].bias[::2], module[5].weight[:, ::2] = 0, 0, 0
        expected = module(**batch)
        pruned = PruneChannels(ratio=0.5).apply(module, Calibration((batch,)))
        assert tuple(pruned[3].weight.shape) == (32, 32)  # type: ignore[index,union-attr]
        torch.testing.assert_close(pruned(**batch), expected)


def test_layers_that_are_excluded_keep_their_outputs() -> None:
    pruned = PruneChannels(ratio=0.5, targets=Targets(exclude=("one",))).apply(Residual(), Calibration((NETWORKS["convolutional"][1],)))
    assert pruned.one.out_channels == 64  # type: ignore[union-attr]
    assert pruned.stem.out_channels == 16  # type: ignore[union-attr]
    assert pruned.classify.out_features == 10  # type: ignore[union-attr]


def test_units_of_an_lstm_that_are_silent_are_not_missed() -> None:
    module, batch = Reader().eval(), NETWORKS["recurrent"][1]
    with torch.no_grad():
        module.answer.weight[:, ::2] = 0
        module.lstm.weight_hh_l0[:, ::2] = 0
        expected = module(**batch)
        pruned = PruneChannels(ratio=0.5, targets=Targets(exclude=("embed",))).apply(module, Calibration((batch,)))
        assert pruned.lstm.hidden_size == 24  # type: ignore[union-attr]
        torch.testing.assert_close(pruned(**batch), expected)


def test_an_lstm_of_several_layers_keeps_its_units_and_that_is_told() -> None:
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.LSTM(16, 8, num_layers=2))
    with pytest.warns(OptkitWarning, match="3 has several layers or a projection and keeps its units"):
        pruned = PruneChannels(ratio=0.5).apply(module, Calibration(({"input": torch.randn(1, 3, 8)},)))
    assert pruned[3].hidden_size == 8 and pruned[0].out_features == 16  # type: ignore[index]


def test_an_lstm_of_two_directions_loses_the_same_silent_units_in_both() -> None:
    module = BilstmClassifier(50, 16, 16, 3).eval()
    batch = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    silence(module.lstm, range(8, 16), ("", "_reverse"))
    module.head.weight.data[:, [*range(8, 16), *range(24, 32)]] = 0
    expected = module(**batch)
    pruned = PruneChannels(ratio=0.5, targets=Targets(include=("lstm",))).apply(module, Calibration((batch,)))
    assert pruned.lstm.hidden_size == 8 and pruned.head.in_features == 16 and pruned.embedding.embedding_dim == 16
    assert torch.allclose(pruned(**batch), expected, atol=1e-6)


def test_an_lstm_that_begins_another_loses_the_same_units() -> None:
    module = LstmForecast(2, 3, 16).eval()
    batch = {"values": torch.randn(4, 8, 2)}
    for layer in (module.encoder, module.decoder):
        silence(layer, range(8, 16), ("",))
    module.head.weight.data[:, 8:] = 0
    expected = module(**batch)
    pruned = PruneChannels(ratio=0.5).apply(module, Calibration((batch,)))
    assert pruned.encoder.hidden_size == pruned.decoder.hidden_size == 8
    assert torch.allclose(pruned(**batch), expected, atol=1e-6)


def silence(layer: nn.LSTM, units: range, directions: tuple[str, ...]) -> None:
    """Set some units of an LSTM to zero for ever: nothing goes in, nothing comes out, and their output gate is shut."""
    rows = [unit + gate * layer.hidden_size for gate in range(4) for unit in units]
    for name in directions:
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(layer, f"{part}_l0{name}").data[rows] = 0
        getattr(layer, f"weight_hh_l0{name}").data[:, list(units)] = 0


def test_int8_packs_what_is_left() -> None:
    make, batch = NETWORKS["perceptron"]
    pruned = PruneChannels(ratio=0.5).apply(make(), Calibration((batch,))).eval()
    expected = pruned(**batch)
    assert (Int8().apply(pruned)(**batch) - expected).norm() < 0.05 * expected.norm()


def test_what_cannot_be_pruned_is_refused(tiny_llama: Any) -> None:
    data = Calibration((NETWORKS["perceptron"][1],))
    with pytest.raises(TransformError, match="is a model of transformers; use prune_ffn, prune_heads or prune_hidden"):
        PruneChannels().apply(tiny_llama(), data)
    with pytest.raises(TransformError, match="has no convolution, linear layer or LSTM within it"):
        PruneChannels().apply(nn.ReLU(), data)
    with pytest.raises(TransformError, match="needs a batch of data to follow"):
        PruneChannels().apply(perceptron())
    with pytest.raises(TransformError, match="removes nothing from Sequential at multiples of 64; use a larger ratio"):
        PruneChannels(ratio=0.1, multiple=64).apply(perceptron(), data)
    with pytest.raises(TargetError, match="matches none"):
        PruneChannels(targets=Targets(include=("nobody",))).apply(perceptron(), data)
