"""A student that learns from a teacher: in a recipe's step, as a loss in any loop, and in the Trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms import Distill, DropLayers, Magnitude, Plan
from optkit.transforms.distill.losses import Distillation, answers_loss
from optkit.transforms.prune.gradual import GradualPruning

Subjects = Callable[..., Subject]
Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]


def tokens(batches: int = 10) -> tuple[dict[str, Tensor], ...]:
    draw = torch.Generator().manual_seed(7)
    return tuple({"input_ids": torch.randint(2, 96, (4, 24), generator=draw)} for _ in range(batches))


def apart(student: nn.Module, teacher: nn.Module, batches: Any = None) -> float:
    """Return how far the answers of two models are apart, in nats a token."""
    with torch.no_grad():
        return sum(float(Distillation(copy.deepcopy(teacher))(student, batch)) for batch in batches or tokens())


def test_a_model_without_a_block_learns_its_old_answers(subject: Subjects) -> None:
    whole = subject()
    untouched = copy.deepcopy(whole.module)
    short = DropLayers(layers=(1,)).apply(whole)
    before = apart(short.module, untouched)
    data = Calibration(tokens(), untouched=lambda: untouched)
    healed = Distill(steps=60, learning_rate=2e-3).apply(short, data)
    assert apart(healed.module, untouched) < 0.7 * before
    assert [step.name for step in healed.history] == ["drop_layers", "distill"]
    assert healed.opens_in == "transformers"


@pytest.mark.parametrize("part", [{"hidden": 1.0}, {"attention": 1.0}, {"next_token": 1.0}], ids=str)
def test_each_part_of_the_loss_goes_down(tiny_llama: Llama, part: dict[str, float]) -> None:
    teacher = tiny_llama(seed=0)
    student = DropLayers(layers=(1,)).apply(copy.deepcopy(teacher))
    loss = Distillation(None if "next_token" in part else teacher, logits=0.0, **part)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    batch, losses = tokens(1)[0], []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(student, batch)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_model_has_nothing_to_learn_from_itself(tiny_llama: Llama) -> None:
    module = tiny_llama()
    loss = Distillation(copy.deepcopy(module), hidden=1.0, attention=1.0, temperature=2.0)
    assert float(loss(module, tokens(1)[0]).detach()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_tempered_distributions_times_the_square(temperature: float) -> None:
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (b / temperature).softmax(-1), (a / temperature).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(answers_loss(a, b, temperature=temperature).double(), expected, rtol=1e-5, atol=1e-6)


def test_positions_that_are_masked_do_not_count() -> None:
    a, b = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    changed = a.clone()
    changed[mask == 0] += torch.randn(5, 7)
    assert torch.equal(answers_loss(a, b, mask), answers_loss(changed, b, mask))


def test_what_was_pruned_stays_pruned_and_dtypes_come_back(subject: Subjects) -> None:
    whole = subject()
    whole.module.to(torch.bfloat16)
    pruned = Magnitude(sparsity=0.5).apply(whole)
    zero = {name: p.detach() == 0 for name, p in pruned.module.named_parameters() if "proj" in name}
    healed = Distill(steps=5, learning_rate=1e-2, next_token=0.1).apply(pruned, Calibration(tokens())).module
    assert all((healed.get_parameter(name)[mask] == 0).all() for name, mask in zero.items())
    assert {parameter.dtype for parameter in healed.parameters()} == {torch.bfloat16}


def test_learning_makes_no_simulated_speed_real(subject: Subjects) -> None:
    healed = Distill(steps=1).apply(Magnitude(sparsity=0.5).apply(subject()), Calibration(tokens(1)))
    assert [step.execution for step in healed.history] == ["simulated", "neutral"]
    assert healed.execution == "simulated"


def test_zeros_grow_while_it_learns_where_a_recipe_says_so(subject: Subjects) -> None:
    whole = Distill(steps=20, gradual=GradualPruning(sparsity=0.5, every=2)).apply(subject(), Calibration(tokens()))
    assert whole.execution == "simulated"  # as long as nothing skips them
    weight = whole.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_student_of_another_width_cannot_be_held_to_the_hidden_states(tiny_llama: Llama) -> None:
    teacher, student = tiny_llama(), tiny_llama(hidden_size=32, num_attention_heads=2)
    with pytest.raises(TransformError, match="hidden states are 32 wide, the teacher's 64: they do not compare; hidden: 0"):
        Distillation(teacher, hidden=1.0)(student, tokens(1)[0])


def test_another_teacher_is_opened_by_the_recipe_only(subject: Subjects, tiny_llama: Llama, logits: Logits) -> None:
    opened: list[str] = []

    def open_model(spec: str) -> nn.Module:
        opened.append(spec)
        return tiny_llama(seed=9)

    before = logits(subject().module)
    goal = logits(tiny_llama(seed=9))
    healed = Distill(steps=60, learning_rate=3e-3, teacher="./big").apply(subject(), Calibration(tokens(), open_model=open_model))
    assert opened == ["./big"]
    assert (logits(healed.module) - goal).norm() < 0.9 * (before - goal).norm()
    with pytest.raises(TransformError, match=r"teacher './big' can only be opened in a recipe; in training code use Distillation"):
        Distill(teacher="./big").apply(subject(), Calibration(tokens()))


def test_nothing_to_learn_and_nothing_to_learn_from_are_refused(subject: Subjects) -> None:
    with pytest.raises(TransformError, match="nothing would be learned"):
        Distill(logits=0).check(Plan(subject()))
    with pytest.raises(TransformError, match="distill needs data to train on"):
        Distill().apply(subject())
    with pytest.raises(TransformError, match="the weights of this one are random"):
        Distill().check(Plan(Subject(subject().module, "shape:tiny", trained=False)))
    with pytest.raises(TransformError, match="without a teacher there are no answers"):
        Distillation(None)


def test_in_the_trainer_a_teacher_is_the_loss_and_zeros_stay(tiny_llama: Llama, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from optkit.transforms.training.callbacks import DistillationTrainer, KeepZeros, PruneGradually

    teacher = tiny_llama()
    student = Magnitude(sparsity=0.3).apply(copy.deepcopy(teacher))
    zero = student.get_parameter("model.layers.0.mlp.up_proj.weight").detach() == 0
    before = apart(student, teacher, tokens(20))
    rows = [{"input_ids": row, "labels": row} for batch in tokens(20) for row in batch["input_ids"]]
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 40, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = DistillationTrainer(
        loss=Distillation(teacher), model=student, args=TrainingArguments(**arguments), train_dataset=rows, callbacks=[KeepZeros()]
    )
    trainer.train()
    assert (student.get_parameter("model.layers.0.mlp.up_proj.weight")[zero] == 0).all()
    assert apart(student.eval(), teacher, tokens(20)) < 0.9 * before
    trainer = DistillationTrainer(
        loss=Distillation(teacher),
        model=student,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        callbacks=[PruneGradually(GradualPruning(sparsity=0.5))],
    )
    assert math.isfinite(trainer.train().training_loss)
    weight = student.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_in_a_loop_of_accelerate_the_same_parts_are_called_by_hand(tiny_llama: Llama) -> None:
    from accelerate import Accelerator

    teacher = tiny_llama()
    accelerator = Accelerator(cpu=True)
    student = DropLayers(layers=(1,)).apply(copy.deepcopy(teacher))
    before = apart(student, teacher, tokens(40))
    loss, schedule = Distillation(teacher), GradualPruning(sparsity=0.3).schedule(student, 40)
    model, optimizer = accelerator.prepare(student, torch.optim.AdamW(student.parameters(), lr=2e-3))
    for step, batch in enumerate(tokens(40), 1):
        accelerator.backward(loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(step)
    assert apart(student, teacher, tokens(40)) < 0.9 * before
    weight = student.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert int((weight == 0).sum()) == round(0.3 * weight.numel())


def test_both_ends_of_a_marked_piece_are_learned() -> None:
    torch.manual_seed(0)
    student, teacher = (pieces() for _ in range(2))
    batch = {"input_ids": torch.randint(0, 40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    assert float(Distillation(teacher)(teacher, batch)) == pytest.approx(0, abs=1e-6)
    loss = Distillation(teacher)(student, batch)
    loss.backward()
    assert float(loss.detach()) > 0 and student.qa_outputs.weight.grad.abs().sum(1).min() > 0


def pieces() -> Any:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForQuestionAnswering(BertConfig(vocab_size=40, **sizes)).eval()
