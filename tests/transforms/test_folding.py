"""Scales that move between layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.transforms.quantize.folding import Fold, apply_fold, folds, shared

Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]


def found(module: nn.Module, batch: Mapping[str, Tensor] | None = None) -> dict[str, tuple[str, ...]]:
    return {fold.producer: fold.consumers for fold in folds(module, batch)}


def fold_all(module: nn.Module, batch: Mapping[str, Tensor] | None = None) -> int:
    """Fold random scales wherever a fold is found; return how many."""
    all_folds = folds(module, batch)
    for fold in all_folds:
        apply_fold(module, fold, shared(fold, torch.rand(len(fold.rows)) * 3 + 0.3))
    return len(all_folds)


def test_a_llama_folds_at_four_places_in_each_block(tiny_llama: Llama) -> None:
    module = tiny_llama(tie_word_embeddings=False)
    at = "model.layers.1."
    assert {name: consumers for name, consumers in found(module).items() if name.startswith(at)} == {
        f"{at}input_layernorm": tuple(f"{at}self_attn.{name}_proj" for name in "qkv"),
        f"{at}self_attn.v_proj": (f"{at}self_attn.o_proj",),
        f"{at}post_attention_layernorm": (f"{at}mlp.gate_proj", f"{at}mlp.up_proj"),
        f"{at}mlp.up_proj": (f"{at}mlp.down_proj",),
    }


def test_looking_changes_nothing(tiny_llama: Llama, logits: Logits) -> None:
    module, fresh = tiny_llama().train(), tiny_llama().train()
    folds(module)
    assert module.training and module.get_submodule("model.layers.0").training
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert torch.equal(logits(module), logits(fresh))


def test_random_scales_leave_the_answers_to_rounding(tiny_llama: Llama, logits: Logits) -> None:
    module = tiny_llama().double()
    before = logits(module)
    assert fold_all(module) == 12
    torch.testing.assert_close(logits(module), before, rtol=0, atol=1e-5)  # a fold computes in float32
    fresh = tiny_llama().double().state_dict()
    moved = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, fresh[name])]
    assert len(moved) == 3 * 9  # all but the embedding, the head and the last norm


class Network(nn.Module):
    """A norm before a linear layer, and what the case puts between two linear layers."""

    def __init__(self, between: nn.Module, residual: bool) -> None:
        super().__init__()
        self.norm, self.first, self.between, self.second = nn.LayerNorm(32), nn.Linear(32, 64), between, nn.Linear(64, 32)
        nn.init.normal_(self.norm.bias)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        made: Tensor = self.second(self.between(self.first(read)))
        return made + read if self.residual else made


@pytest.mark.parametrize(
    ("between", "residual", "expected"),
    [
        (nn.ReLU(), False, {"norm": ("first",), "first": ("second",)}),
        (nn.GELU(), False, {"norm": ("first",)}),
        (nn.ReLU(), True, {"first": ("second",)}),
        (nn.Tanh(), True, {}),
    ],
)
def test_what_lies_between_decides_and_a_second_reader_refuses(between: nn.Module, residual: bool, expected: dict[str, Any]) -> None:
    module, batch = Network(between, residual), {"x": torch.randn(5, 32)}
    before = module(**batch)
    assert found(module, batch) == expected
    assert fold_all(module, batch) == len(expected)
    torch.testing.assert_close(module(**batch), before, rtol=0, atol=1e-5)


def test_a_layer_whose_weight_another_one_shares_is_left_out() -> None:
    module, batch = Network(nn.ReLU(), False), {"x": torch.randn(5, 32)}
    module.extra = nn.Linear(64, 32)
    module.extra.weight = module.second.weight
    assert found(module, batch) == {"norm": ("first",)}


def test_heads_that_share_values_get_one_scale(tiny_llama: Llama) -> None:
    fold = next(fold for fold in folds(tiny_llama()) if fold.producer.endswith("v_proj"))
    assert fold.rows.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    scale = torch.rand(64) + 0.5
    with pytest.raises(TransformError, match="differs between columns"):
        apply_fold(tiny_llama(), fold, scale)
    even = shared(fold, scale)
    torch.testing.assert_close(even[:16], (scale[:16] + scale[16:32]) / 2)
    assert torch.equal(even[:16], even[16:32])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused_before_anything_changes(tiny_llama: Llama, bad: float) -> None:
    module = tiny_llama()
    scale = torch.ones(64)
    scale[3] = bad
    with pytest.raises(TransformError, match="not positive and finite"):
        apply_fold(module, Fold("model.layers.0.input_layernorm", ("model.layers.0.self_attn.q_proj",), torch.arange(64)), scale)
    assert torch.equal(module.get_submodule("model.layers.0.input_layernorm").weight, torch.ones(64))  # type: ignore[arg-type]


def test_without_a_batch_only_language_models_are_followed() -> None:
    with pytest.raises(TransformError, match="a batch of its inputs is needed"):
        folds(nn.Sequential(nn.Linear(4, 4)))
