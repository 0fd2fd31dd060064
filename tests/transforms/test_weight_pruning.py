"""magnitude, wanda and sparsegpt: where the zeros are, what the rest becomes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.transforms import Magnitude, Plan, Sparsegpt, Wanda
from optkit.transforms.prune.masks import Pattern
from optkit.transforms.prune.sparsegpt import sparsegpt
from optkit.transforms.prune.wanda import wanda

Subjects = Callable[..., Subject]
METHODS = [Magnitude, Wanda, Sparsegpt]


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs whose columns depend on one another and differ in size."""
    return torch.randn(rows, columns) @ torch.randn(columns, columns) * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


def plain_sparsegpt(weight: Tensor, gram: Tensor, keeps: Pattern | float, together: int, damping: float = 0.01) -> Tensor:
    """The law of the paper by an inverse for every column, in float64."""
    left, h = weight.double().clone(), gram.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverses = [torch.linalg.inv(h[j:, j:])[0] for j in range(len(h))]
    doomed = torch.zeros_like(left, dtype=torch.bool)
    for j, row in enumerate(inverses):
        of = keeps.of if isinstance(keeps, Pattern) else together
        if j % of == 0:
            columns = range(j, min(j + of, len(h)))
            scores = torch.stack([left[:, k].square() / inverses[k][0] for k in columns], dim=1)
            if isinstance(keeps, Pattern):
                doomed[:, columns] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, : of - keeps.kept], True)
            else:
                mask = torch.zeros(scores.numel(), dtype=torch.bool)
                mask[scores.flatten().argsort()[: round(keeps * scores.numel())]] = True
                doomed[:, columns] = mask.view(scores.shape)
        gone = left[:, j] * doomed[:, j]
        left[:, j:] -= gone[:, None] * row / row[0]
        left[:, j][doomed[:, j]] = 0
    return left


@pytest.mark.parametrize("keeps", [0.5, 0.3, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_sparsegpt_follows_the_law_of_the_paper(keeps: Any) -> None:
    x = correlated(400, 160)
    weight, gram = torch.randn(7, 160), x.T @ x / len(x)
    found, expected = sparsegpt(weight, gram, keeps), plain_sparsegpt(weight, gram, keeps, together=128)
    assert ((found == 0) == (expected == 0)).all()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_wanda_takes_the_least_products_of_every_row_and_changes_nothing_else() -> None:
    weight, squares = torch.randn(9, 40), torch.rand(40)
    found = wanda(weight, squares, 0.25)
    assert ((found == 0).sum(1) == 10).all() and ((found == weight) | (found == 0)).all()
    scores = weight.abs() * squares.sqrt()
    assert (scores.masked_fill(found != 0, 0).amax(1) <= scores.masked_fill(found == 0, 9).amin(1)).all()


def test_wanda_within_a_layer_takes_the_least_products_of_all_rows() -> None:
    weight, squares = torch.randn(9, 40), torch.rand(40)
    found = wanda(weight, squares, 0.25, "layer")
    scores = weight.abs() * squares.sqrt()
    assert int((found == 0).sum()) == 90
    assert scores[found == 0].max() <= scores[found != 0].min()
    through = Wanda(sparsity=0.25, compare="layer").apply(linear_of(weight), Calibration(({"input": torch.diag(squares.sqrt())},)))
    assert torch.equal(through.weight.detach() == 0, found == 0)


def test_wanda_refuses_to_compare_over_a_layer_what_a_pattern_holds_within_rows() -> None:
    with pytest.raises(ValidationError, match="a pattern holds within each row"):
        Wanda(pattern="2:4", compare="layer")


def test_what_is_made_good_shows_in_the_outputs() -> None:
    x = torch.randn(600, 24) @ torch.randn(24, 96) * torch.logspace(-1, 1, 96) + 0.1 * torch.randn(600, 96)
    weight, gram = torch.randn(32, 96), x.T @ x / len(x)
    magnitude = Magnitude(sparsity=0.5).apply(linear_of(weight)).weight.detach()
    errors = [
        float((x @ (made - weight).T).square().mean())
        for made in (magnitude, wanda(weight, gram.diagonal(), 0.5), sparsegpt(weight, gram, 0.5))
    ]
    assert errors[2] < errors[1] / 2
    assert errors[1] < errors[0] / 2


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


def test_inputs_that_never_come_do_no_harm() -> None:
    x = correlated(300, 64)
    x[:, ::3] = 0
    found = sparsegpt(torch.randn(5, 64), x.T @ x / len(x), 0.5)
    assert found.isfinite().all() and int((found == 0).sum()) == 160


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "share"), [({}, 0.5), ({"sparsity": 0.3}, 0.3), ({"pattern": "2:4"}, 0.5), ({"pattern": "6:8"}, 0.25)]
)
def test_every_layer_of_a_model_gets_its_zeros(
    subject: Subjects, calibration: Calibration, method: Any, settings: dict[str, Any], share: float
) -> None:
    before = subject(tie_word_embeddings=False)
    pruned = method(**settings).apply(before, calibration)
    for name, layer in pruned.module.named_modules():
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape
            zeros = int((layer.weight == 0).sum())
            exact = {round(share * rows * columns), rows * round(share * columns)}
            assert zeros == 0 if name == "lm_head" else zeros in exact, name
            if "pattern" in settings and name != "lm_head":
                kept, of = (int(number) for number in settings["pattern"].split(":"))
                assert ((layer.weight != 0).unflatten(1, (-1, of)).sum(-1) == kept).all()
    assert pruned.execution == "simulated" and pruned.opens_in == "transformers"


@pytest.mark.parametrize("method", [Wanda, Sparsegpt])
def test_each_block_sees_what_the_pruned_ones_before_it_answer(subject: Subjects, calibration: Calibration, method: Any) -> None:
    """A block is pruned by its inputs, so changing the first block alone changes the choice in the second."""
    last = "model.layers.2.mlp.down_proj"
    whole = method().apply(subject(), calibration).module.get_submodule(last).weight
    alone = method(targets=Targets(include=(last,))).apply(subject(), calibration).module.get_submodule(last).weight
    assert not torch.equal(whole, alone)


@pytest.mark.parametrize("method", METHODS)
def test_a_bare_layer_is_pruned(method: Any) -> None:
    linear = nn.Linear(64, 8)
    data = Calibration(({"input": torch.randn(50, 64)},))
    assert int((method(pattern="2:4").apply(linear, data).weight == 0).sum()) == 256


def test_the_conv1d_of_gpt2_is_pruned_along_its_inputs(tokenizer: Any, ids: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).eval()
    pruned = Wanda(pattern="2:4").apply(deepcopy(model), Calibration(({"input_ids": ids},)))
    weight = pruned.transformer.h[1].mlp.c_fc.weight  # (in, out)
    assert ((weight.T != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_and_pattern_together_are_refused(method: Any) -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        method(sparsity=0.5, pattern="2:4")
    with pytest.raises(ValidationError, match="write 2:4"):
        method(pattern="half")


def test_a_pattern_that_does_not_divide_names_the_layer(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"pattern 2:7 does not divide in_features 64 of model.layers.0.self_attn.q_proj \(21 of 21"):
        Wanda(pattern="2:7").check(Plan(subject()))


def test_a_pattern_has_no_global_scope(subject: Subjects) -> None:
    with pytest.raises(TransformError, match="no global scope"):
        Magnitude(pattern="2:4", scope="global").check(Plan(subject()))


def test_without_data_the_one_that_needs_none_is_named(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"sparsegpt needs calibration data; .*use magnitude"):
        Sparsegpt().apply(subject())


def test_a_layer_that_no_data_reaches_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(TransformError, match=r"no calibration data reached 1 of 2 layers \(unused\)"):
        Wanda().apply(Half(), Calibration(({"x": torch.randn(9, 8)},)))
