"""Products of two thinner layers: the nearest of their rank, findable, packed and opened again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.low_rank import LowRankLinear
from optkit.transforms import Int4, LowRank, Plan
from optkit.transforms.factorize.svd import allotted, rank_within, truncated
from optkit.transforms.layers import inner_layers
from optkit.transforms.prune.importance import loudness

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture
def data() -> Calibration:
    draw = torch.Generator().manual_seed(3)
    return Calibration(tuple({"input_ids": torch.randint(2, 96, (4, 24), generator=draw)} for _ in range(3)))


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (33, 33)])
def test_without_data_it_is_the_truncated_singular_value_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    down, up = truncated(weight, 7)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close((up @ down).double(), u[:, :7] * s[:7] @ v[:7], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_with_data_no_other_of_its_rank_has_a_smaller_error_of_the_outputs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(400, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    gram = x.T @ x / len(x)
    down, up = truncated(weight, 7, gram)
    whitened = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))
    error = ((up @ down - weight) @ gram @ (up @ down - weight).T).trace()
    torch.testing.assert_close(error, whitened[7:].square().sum())


def test_outputs_that_the_loss_hears_are_kept_better() -> None:
    weight, x, loud = torch.randn(30, 40), torch.randn(300, 40), torch.logspace(-3, 3, 30)
    gram = x.T @ x / 300
    errors = []
    for weights in (None, loud):
        down, up = truncated(weight, 9, gram, weights)
        errors.append(float((((x @ (up @ down - weight).T) ** 2).mean(0) * loud).sum()))
    best = torch.linalg.svdvals(loud.double().sqrt()[:, None] * weight.double() @ torch.linalg.cholesky(gram.double()))[9:].square().sum()
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] == pytest.approx(float(best), rel=0.01)


def test_errors_that_cancel_for_the_loss_are_let_be() -> None:
    weight, x, g = torch.randn(30, 40), torch.randn(300, 40), torch.randn(300, 30) @ torch.randn(30, 30)
    gram, loud = (x.T @ x / 300).double(), (g.T @ g / 300).double()

    def heard(loud_as: torch.Tensor) -> float:
        down, up = truncated(weight, 9, gram, loud_as)
        wrong = (up @ down - weight).double()
        return float((loud @ wrong @ gram @ wrong.T).trace())

    best = torch.linalg.svdvals(torch.linalg.cholesky(loud).T @ weight.double() @ torch.linalg.cholesky(gram))[9:].square().sum()
    assert heard(loud) == pytest.approx(float(best), rel=0.05)
    assert heard(loud) < 0.9 * heard(loud.diagonal())


def test_the_widest_layers_have_the_diagonal_alone_where_memory_is_short(subject: Subjects, data: Calibration) -> None:
    module = subject().module
    names = [name for name in inner_layers(module)]
    whole, short = loudness(module, data, names), loudness(module, data, names, most_bytes=4 * 70**2)
    assert {tensor.ndim for tensor in whole.values()} == {2}
    assert {tensor.ndim for tensor in short.values()} == {1, 2}
    for name, tensor in short.items():
        torch.testing.assert_close(tensor, whole[name] if tensor.ndim == 2 else whole[name].diagonal())


def test_inputs_that_span_few_directions_are_kept_whole() -> None:
    weight, x = torch.randn(40, 30), torch.randn(100, 5) @ torch.randn(5, 30)
    down, up = truncated(weight, 5, x.T @ x / 100)
    torch.testing.assert_close(x @ (up @ down).T, x @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns", "ratio"), [(64, 64, 0.2), (128, 64, 0.5), (384, 1024, 0.2), (3, 3, 0.9)])
def test_the_rank_is_the_largest_within_the_bytes(rows: int, columns: int, ratio: float) -> None:
    rank = rank_within(rows, columns, ratio)
    assert rank * (rows + columns) <= (1 - ratio) * rows * columns < (rank + 1) * (rows + columns)


def test_whitened_comes_nearer_to_the_untouched_model_than_plain(subject: Subjects, logits: Logits, data: Calibration) -> None:
    exact = logits(subject().module)
    whitened, plain = (
        float((logits(LowRank(ratio=0.4, method=method).apply(subject(), data).module) - exact).norm())  # type: ignore[arg-type]
        for method in ("whitened", "plain")
    )
    assert whitened < 0.9 * plain


def test_weights_are_saved_where_it_costs_least_and_the_history_says_so(subject: Subjects, logits: Logits, data: Calibration) -> None:
    whole = subject()
    with torch.no_grad():
        for block in range(3):
            weight = whole.module.get_parameter(f"model.layers.{block}.mlp.up_proj.weight")
            weight[:, 8:] = 0  # of rank 8, so that nothing is lost there
    before = logits(whole.module)
    thin = LowRank(ratio=0.12).apply(whole, data)
    ranks = thin.history[0].settings["ranks"]
    assert ranks and set(ranks) <= {f"model.layers.{block}.mlp.up_proj" for block in range(3)}
    assert (logits(thin.module) - before).norm() < 1e-4 * before.norm()
    again = LowRank(ratio=0.12, ranks=ranks).apply(subject(), data)
    assert again.history == thin.history


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_ranks_keep_the_budget_and_the_flattest_spectrum_stays_whole(ratio: float) -> None:
    steep, flat = torch.logspace(0, -6, 60, dtype=torch.float64), torch.ones(60, dtype=torch.float64)
    sizes = {"steep": (steep, 60, 80), "steep too": (steep, 60, 80), "flat": (flat, 60, 80)}
    ranks = allotted(sizes, ratio)
    kept = sum(ranks[name] * (rows + columns) if name in ranks else rows * columns for name, (_, rows, columns) in sizes.items())
    assert kept <= (1 - ratio) * 3 * 60 * 80
    assert "flat" not in ranks and ranks["steep"] == ranks["steep too"] > 1


def test_int4_packs_both_factors_and_the_artefact_opens_again(subject: Subjects, logits: Logits, data: Calibration, tmp_path: Path) -> None:
    thin = LowRank(method="plain", targets={"include": ("*mlp*",)}).apply(subject(), data)  # type: ignore[arg-type]
    packed = Int4(group_size=64, targets={"exclude": ("*.up",)}).apply(thin)  # type: ignore[arg-type]
    layer = packed.module.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, LowRankLinear)
    assert isinstance(layer.down, Int4Linear)
    assert type(layer.up) is nn.Linear
    optkit.save(packed, tmp_path / "saved")
    assert torch.equal(logits(optkit.load(tmp_path / "saved").module), logits(packed.module))


def test_a_matrix_too_small_for_a_rank_of_one_is_refused(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"ratio 0.99 leaves model.layers.0.*less than a rank of 1; use a ratio of at most 0.9"):
        LowRank(ratio=0.99).check(Plan(subject()))


def test_without_data_there_is_nothing_to_whiten_by(subject: Subjects) -> None:
    with pytest.raises(TransformError, match="low_rank needs calibration data to whiten by; give some, or use method: plain"):
        LowRank().apply(subject())
