"""Quantization-aware training: in a recipe, and around a training loop of any kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

import optkit
from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels import native
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.transforms import DropLayers, Int4, Int8, Magnitude, Plan, Qat
from optkit.transforms.distill.losses import Distillation, answers_loss
from optkit.transforms.quantize.fake import FakeInt4Linear, FakeInt8Embedding, FakeInt8Linear
from optkit.transforms.quantize.qat import convert, prepare
from optkit.transforms.training.loop import Course, heal

Subjects = Callable[..., Subject]
Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]


@pytest.fixture
def text() -> Calibration:
    """Return four batches of tokens in which each follows from the one before."""
    starts = torch.randint(2, 96, (16, 1), generator=torch.Generator().manual_seed(2))
    rows = (starts + 7 * torch.arange(16)) % 90 + 2
    return Calibration(tuple({"input_ids": part} for part in rows.split(4)))


def tokens(batches: int) -> tuple[dict[str, Tensor], ...]:
    draw = torch.Generator().manual_seed(7)
    return tuple({"input_ids": torch.randint(2, 96, (4, 32), generator=draw)} for _ in range(batches))


def train(model: nn.Module, ids: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()
    return optimizer


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(layer) for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))}


def agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 1e-5 * other.norm())


@pytest.fixture(autouse=True)
def in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run packed layers without kernels, which may round activations to bfloat16: what is left is the rounding of sums."""
    monkeypatch.setenv("OPTKIT_KERNELS", "torch")
    native.forget()
    yield
    monkeypatch.undo()
    native.forget()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"format": "int8"}, Int8()),
        ({"group_size": 32}, Int4(group_size=32)),
        ({"head": "int4"}, Int4(head="int4")),
        ({"targets": Targets(exclude=("o_proj", "lm_head"))}, Int4(targets=Targets(exclude=("o_proj", "lm_head")))),
    ],
    ids=str,
)
def test_prepared_and_converted_the_same_layers_are_packed_as_without_training(
    tiny_llama: Llama, logits: Logits, settings: dict[str, Any], plain: Int4 | Int8, tied: bool
) -> None:
    prepared = prepare(tiny_llama(tie_word_embeddings=tied), **settings)
    before = logits(prepared)
    packed = convert(prepared)
    other = plain.apply(tiny_llama(tie_word_embeddings=tied))
    assert kinds(packed) == kinds(other)
    assert agree(logits(packed), before)
    assert agree(logits(packed), logits(other))


def test_the_kernels_give_the_answers_that_were_trained(tiny_llama: Llama, logits: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(tiny_llama(initializer_range=0.05))
    before = logits(model)
    monkeypatch.setenv("OPTKIT_KERNELS", "auto")
    native.forget()
    assert (logits(convert(model)) - before).norm() < 0.02 * before.norm()


def test_a_tied_head_stays_tied_while_it_trains_and_when_it_is_packed(tiny_llama: Llama, logits: Logits, text: Calibration) -> None:
    model = prepare(tiny_llama())
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    assert isinstance(embedding, FakeInt8Embedding)
    assert isinstance(head, FakeInt8Linear)
    assert head.weight is embedding.weight
    train(model, text.batches[0]["input_ids"], 2)
    before = logits(model)
    packed = convert(model)
    assert isinstance(packed.get_submodule("model.embed_tokens"), Int8Embedding)
    assert packed.get_submodule("lm_head").tied is packed.get_submodule("model.embed_tokens")
    assert agree(logits(packed), before)


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_the_loss_goes_down_in_a_plain_loop_and_the_converted_model_keeps_it(tiny_llama: Llama, text: Calibration, format: Any) -> None:
    ids = torch.cat([batch["input_ids"] for batch in text.batches])
    model = prepare(tiny_llama().train(), format=format)
    with torch.no_grad():
        before = loss(model, ids)
    train(model, ids, 30)
    with torch.no_grad():
        after = loss(model.eval(), ids)
        assert after < 0.5 * before
        torch.testing.assert_close(loss(convert(model), ids), after, rtol=0.01, atol=0.01)


def test_every_parameter_gets_a_gradient(tiny_llama: Llama, ids: Tensor) -> None:
    model = prepare(tiny_llama())
    loss(model, ids).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert missing == []


def test_a_checkpoint_in_the_middle_goes_on_to_the_same_weights(tiny_llama: Llama, text: Calibration, tmp_path: Path) -> None:
    ids = text.batches[0]["input_ids"]
    whole = prepare(tiny_llama())
    optimizer = train(whole, ids, 2)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, ids, 2, optimizer)
    again = prepare(tiny_llama(seed=5))
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-3)
    again.load_state_dict(kept[0])
    fresh.load_state_dict(kept[1])
    train(again, ids, 2, fresh)
    one, other = convert(whole).state_dict(), convert(again).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama: Llama, ids: Tensor) -> None:
    plain, saving = prepare(tiny_llama()).train(), prepare(tiny_llama()).train()
    saving.gradient_checkpointing_enable()  # type: ignore[operator]
    for model in (plain, saving):
        loss(model, ids).backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_train_and_eval_pass_through(tiny_llama: Llama) -> None:
    packed = convert(prepare(tiny_llama().train()))
    assert all(layer.training for layer in packed.modules())
    assert not any(layer.training for layer in convert(prepare(tiny_llama().eval())).modules())


def test_it_trains_with_accelerate(tiny_llama: Llama, text: Calibration, logits: Logits) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = prepare(tiny_llama().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in text.batches[0]["input_ids"]], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(6):
        for batch in loader:
            found = loss(model, batch["input_ids"])
            accelerator.backward(found)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(found.detach()))
    assert losses[-1] < losses[0]
    trained = accelerator.unwrap_model(model).eval()
    before = logits(trained)
    assert agree(logits(convert(trained)), before)


def test_it_trains_with_the_trainer_of_transformers_and_opens_its_checkpoint(
    tiny_llama: Llama, text: Calibration, logits: Logits, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = text.batches[index // 4]["input_ids"][index % 4]
            return {"input_ids": row, "labels": row}

    def trainer(model: nn.Module, steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=True,
            logging_steps=1,
        )
        return Trainer(model=model, args=arguments, train_dataset=Rows())

    model = prepare(tiny_llama())
    first = trainer(model, 4)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = prepare(tiny_llama(seed=5))
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval()), logits(model.eval()))
    before = logits(model)
    assert agree(logits(convert(model)), before)


def test_in_a_model_of_half_precision_the_masters_are_float32_and_the_answers_stay_half(tiny_llama: Llama, logits: Logits) -> None:
    model = prepare(tiny_llama().to(torch.bfloat16))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, FakeInt4Linear)
    assert layer.weight.dtype == torch.float32
    before = logits(model)
    packed = convert(model)
    assert before.dtype == logits(packed).dtype == torch.bfloat16
    assert (logits(packed) - before).float().norm() < 0.03 * before.float().norm()


def test_conv1d_of_gpt2_is_turned(logits: Logits) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_layer=2, n_embd=64, n_head=4, n_positions=64, initializer_range=0.2)).eval()
    plain = Int4().apply(copy.deepcopy(model))
    assert agree(logits(convert(prepare(model))), logits(plain))


def test_a_bare_layer_is_prepared_and_converted() -> None:
    layer = prepare(nn.Linear(64, 8), group_size=32)
    x = torch.randn(3, 64)
    expected = layer(x).detach()
    assert agree(convert(layer)(x).detach(), expected)


def test_what_is_not_prepared_is_not_converted(mlp: Callable[[], nn.Module]) -> None:
    with pytest.raises(TransformError, match="has no layer to convert; call prepare on it first"):
        convert(mlp())
    with pytest.raises(TransformError, match="96 of Linear"):
        prepare(nn.Linear(96, 8))
    with pytest.raises(TargetError, match="matches none"):
        prepare(mlp(), targets=Targets(include=("no_such",)))
    with pytest.raises(TransformError, match="meta device has no weight to train"), torch.device("meta"):
        prepare(mlp(), group_size=32)


def test_training_in_a_recipe_wins_back_answers_that_rounding_has_cost(subject: Subjects, logits: Logits) -> None:
    def whole() -> Subject:
        return subject(3, initializer_range=0.05)

    exact, plain = logits(whole().module), logits(Int4().apply(whole()).module)
    healed = logits(Qat(steps=40, batch_size=8).apply(whole(), Calibration(tokens(40))).module)
    assert (healed - exact).norm() < 0.85 * (plain - exact).norm()


def test_it_heals_what_pruning_has_cost_and_keeps_what_was_pruned(subject: Subjects, logits: Logits) -> None:
    exact = logits(subject(3).module)
    steps = [DropLayers(layers=(1,)), Magnitude(sparsity=0.5)]

    def pruned() -> Subject:
        found = subject(3)
        for step in steps:
            found = step.apply(found)
        return found

    zero = {name: layer.weight == 0 for name, layer in pruned().module.named_modules() if isinstance(layer, nn.Linear) and "mlp" in name}
    plain = Int8().apply(pruned()).module
    data = Calibration(tokens(40), untouched=lambda: subject(3).module)
    healed = Qat(format="int8", steps=60, learning_rate=2e-3).apply(pruned(), data)
    assert (logits(healed.module) - exact).norm() < 0.9 * (logits(plain) - exact).norm()
    assert all((healed.module.get_submodule(name).weight[mask] == 0).all() for name, mask in zero.items())  # type: ignore[index]
    assert [step.name for step in healed.history] == ["drop_layers", "magnitude", "qat"]


def test_the_same_seed_gives_the_same_model_and_another_one_another(subject: Subjects) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 100)  # the global state decides nothing
        return Qat(steps=4, seed=seed).apply(subject(), Calibration(tokens(4))).module.state_dict()

    one, again, other = run(0), run(0), run(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_draws_nothing_from_the_global_random_state_and_restores_the_mode(subject: Subjects) -> None:
    before = torch.get_rng_state()
    whole = subject()
    state = torch.get_rng_state()
    changed = Qat(steps=2).apply(replace_module(whole, whole.module.train()), Calibration(tokens(2))).module
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in changed.modules())
    torch.set_rng_state(before)


def replace_module(whole: Subject, module: nn.Module) -> Subject:
    return Subject(module, whole.source, tokenizer=whole.tokenizer)


def test_without_a_teacher_it_learns_the_next_token(subject: Subjects, text: Calibration) -> None:
    ids = torch.cat([batch["input_ids"] for batch in text.batches])
    with torch.no_grad():
        before = loss(Int4().apply(subject()).module, ids)
        after = loss(Qat(distill=False, steps=40, learning_rate=2e-3, length=16).apply(subject(), text).module, ids)
    assert after < 0.5 * before


def test_a_model_of_half_precision_comes_back_in_half_precision(subject: Subjects, logits: Logits) -> None:
    whole = subject()
    healed = Qat(steps=2).apply(replace_module(whole, whole.module.to(torch.bfloat16)), Calibration(tokens(2))).module
    plain = Int4().apply(subject().module.to(torch.bfloat16))
    assert {name: tensor.dtype for name, tensor in healed.state_dict().items()} == {
        name: tensor.dtype for name, tensor in plain.state_dict().items()
    }
    assert logits(healed).dtype == torch.bfloat16
    assert {layer.compute_dtype for layer in healed.modules() if isinstance(layer, Int4Linear | Int8Linear | Int8Embedding)} == {
        torch.bfloat16
    }


def test_inputs_of_half_precision_fit_a_student_in_float32(mlp: Callable[[], nn.Module]) -> None:
    data = Calibration(({"input": torch.randn(4, 64).bfloat16()},))
    healed = Qat(group_size=32, steps=2).apply(mlp().to(torch.bfloat16), data)
    assert healed(data.batches[0]["input"]).dtype == torch.bfloat16


def test_it_tells_how_far_it_has_come(subject: Subjects) -> None:
    heard: list[str] = []
    Qat(steps=20).apply(subject(), Calibration(tokens(2), tell=heard.append))
    assert len(heard) == 20
    assert heard[9].startswith("step 10 of 20, loss ")


def test_a_module_without_logits_learns_the_teachers_outputs(mlp: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    whole = mlp()
    data = Calibration(tuple({"input": torch.randn(8, 64)} for _ in range(64)))
    x = torch.randn(64, 64)
    with torch.no_grad():
        exact = whole(x)
        plain = Int4(group_size=32).apply(copy.deepcopy(whole))(x)
        healed = Qat(group_size=32, steps=100, batch_size=16).apply(copy.deepcopy(whole), data)(x)
    assert (healed - exact).norm() < 0.9 * (plain - exact).norm()
    with pytest.raises(TransformError, match=r"Sequential is no causal language model.*learn a teacher"):
        Qat(group_size=32, steps=1, distill=False).apply(whole, data)


def test_rows_of_different_lengths_come_one_at_a_time(subject: Subjects) -> None:
    batches = tuple({"input_ids": torch.randint(2, 96, (2, size)), "attention_mask": torch.ones(2, size).long()} for size in (8, 12))
    healed = Qat(steps=5).apply(subject(), Calibration(batches))
    assert isinstance(healed.module.get_submodule("model.layers.0.mlp.up_proj"), Int4Linear)


def test_missing_data_is_refused_with_the_remedy_before_anything_is_changed(subject: Subjects) -> None:
    assert Qat().needs_data
    assert Qat(steps=10, batch_size=3).data_items == 30
    whole = subject()
    for data in (None, Calibration()):
        with pytest.raises(TransformError, match=r"qat needs data to train on.*take int4 or int8, which need no data"):
            Qat().apply(whole, data)
    assert type(whole.module.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": 2.0}, {"batch_size": 0}, {"length": 1}, {"format": "int3"}, {"seed": -1}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Qat(**wrong)


def test_random_weights_are_refused(subject: Subjects) -> None:
    whole = Subject(subject().module, "shape:tiny", trained=False)
    with pytest.raises(TransformError, match="the weights of this one are random; use int4 or int8"):
        Qat().check(Plan(whole))


def test_a_rate_that_is_too_high_is_told(subject: Subjects) -> None:
    with pytest.raises(TransformError, match=r"the loss is (nan|inf) at step \d+; use a learning_rate below 1"):
        whole = subject()
        with torch.no_grad():
            whole.module.model.norm.weight.mul_(1e38)  # type: ignore[union-attr]
        Qat(steps=50, learning_rate=1.0).apply(whole, Calibration(tokens(4)))


def test_a_model_that_may_not_be_trained_is_refused(mlp: Callable[[], nn.Module]) -> None:
    frozen = prepare(mlp(), group_size=32).requires_grad_(False)
    with pytest.raises(TransformError, match="no parameter asks for a gradient"):
        heal(frozen, Distillation(mlp()), Calibration(({"input": torch.randn(2, 64)},)), Course(1, 1e-3, 1, 8, 0))


def test_what_was_healed_is_saved_and_opened_again(subject: Subjects, tmp_path: Path, logits: Logits) -> None:
    healed = Qat(steps=2).apply(subject(), Calibration(tokens(2)))
    optkit.save(healed, tmp_path / "healed")
    assert torch.equal(logits(optkit.load(tmp_path / "healed").module), logits(healed.module))


def test_the_loss_is_the_divergence_from_the_teachers_distribution() -> None:
    answers, wanted = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    p, q = wanted.softmax(-1), answers.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(answers_loss(answers, wanted).double(), each.mean(), rtol=1e-4, atol=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(answers_loss(answers, wanted, mask).double(), each[mask == 1].mean(), rtol=1e-4, atol=1e-5)
    assert float(answers_loss(wanted, wanted)) == pytest.approx(0, abs=1e-6)
