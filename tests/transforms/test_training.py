"""The loop that heals: its checkpoints, its zeros, and that an interruption at any step changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from optkit.core.subject import Calibration
from optkit.transforms.prune.gradual import GradualPruning, cubic
from optkit.transforms.training.loop import Course, heal
from optkit.transforms.training.zeros import Zeros

COURSE = Course(steps=30, learning_rate=1e-2, batch_size=2, length=8, seed=5, accumulation=3, dropout=True)
KILLED = """
import json, os, signal, sys
from pathlib import Path

import torch
import torch._dynamo  # or each of the trainings to come would import it
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_training import COURSE, data, net, loss_of
from optkit.transforms.prune.gradual import GradualPruning
from optkit.transforms.training.loop import heal

root = Path(sys.argv[1])

def train(folder, kill_at=None):
    module = net()
    schedule = GradualPruning(sparsity=0.4, every=3).schedule(module, COURSE.steps)
    def after(step):
        schedule.step(step)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    losses = heal(module, loss_of, data(folder), COURSE, after, keep_every_s=0)
    torch.save({"weights": module.state_dict(), "losses": losses}, folder / "end.pt")

def apart(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]

apart(lambda: train(root / "whole"))
whole = torch.load(root / "whole" / "end.pt", weights_only=True)
found = []
for step in range(1, COURSE.steps + 1):
    folder = root / str(step)
    folder.mkdir()
    ended = apart(lambda: train(folder, step))
    apart(lambda: train(folder))
    end = torch.load(folder / "end.pt", weights_only=True)
    equal = all(torch.equal(end["weights"][name], tensor) for name, tensor in whole["weights"].items())
    found.append([os.WIFSIGNALED(ended), equal, end["losses"] == whole["losses"]])
print(json.dumps(found))
"""


class Net(nn.Module):
    """Two layers with a dropout and running statistics between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.drop, self.two = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(self.drop(self.norm(self.one(x)).relu()))
        return found


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def data(folder: Path | None = None) -> Calibration:
    draw = torch.Generator().manual_seed(2)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return Calibration(tuple({"x": torch.randn(5, 8, generator=draw)} for _ in range(3)), checkpoints=folder)


def loss_of(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = (module(**batch) - batch["x"][:, :3].abs()).square().mean()
    return found


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where the system has one: thirty trainings wait for a disk some two thousand times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_killed_at_any_of_thirty_steps_it_ends_in_the_same_weights_with_the_same_log(quick_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(quick_folder), str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[True, True, True]] * COURSE.steps
    ends = [load_file(quick_folder / name / f"step-{COURSE.steps - 1:07d}" / "tensors.safetensors") for name in ("whole", "7", "13")]
    assert any(name.startswith("optimizer.0.exp_avg_sq") for name in ends[0])
    assert all(torch.equal(end[name], tensor) for end in ends for name, tensor in ends[0].items())


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = net()
    expected = heal(whole, loss_of, data(), COURSE)
    first = net()
    told: list[str] = []
    heal(first, loss_of, data(tmp_path), COURSE, keep_every_s=0)
    kept = sorted(tmp_path.glob("step-*"))
    assert [folder.name for folder in kept] == ["step-0000028", "step-0000029"]
    (kept[1] / "tensors.safetensors").write_bytes(b"no tensors")
    again = net()
    calibration = Calibration(data().batches, checkpoints=tmp_path, tell=told.append)
    assert heal(again, loss_of, calibration, COURSE, keep_every_s=0) == expected
    assert told[0] == "going on after step 28"
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_checkpoint_of_another_start_is_left_alone(tmp_path: Path) -> None:
    heal(net(), loss_of, data(tmp_path), COURSE, keep_every_s=0)
    other = net()
    with torch.no_grad():
        other.get_parameter("one.bias").add_(1)
    told: list[str] = []
    heal(other, loss_of, Calibration(data().batches, checkpoints=tmp_path, tell=told.append), COURSE, keep_every_s=0)
    assert not any("going on" in text for text in told)


def test_it_tells_how_far_it_is_and_how_long_it_will_take() -> None:
    told: list[str] = []
    heal(net(), loss_of, Calibration(data().batches, tell=told.append), COURSE)
    assert told[-1].startswith("step 30 of 30, loss 0.") and told[-1].endswith(", 0 s left")


def test_the_random_numbers_of_the_caller_are_not_used_up() -> None:
    module = net()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    heal(module, loss_of, data(), COURSE)
    assert torch.equal(torch.rand(3), expected)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    def train(batch_size: int, accumulation: int) -> nn.Module:
        module = nn.Linear(8, 3)
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        course = Course(2, 1e-2, batch_size, 8, 0, accumulation)
        heal(module, lambda m, b: (m(b["x"]) - b["x"][:, :3]).square().mean(), Calibration(({"x": torch.ones(12, 8)},)), course)
        return module

    torch.testing.assert_close(train(6, 1).weight, train(2, 3).weight)


def test_zeros_stay_while_the_rest_learns() -> None:
    module = net()
    with torch.no_grad():
        module.get_parameter("one.weight")[:, ::2] = 0
    zeros = Zeros(module)
    assert len(zeros) == 64
    before = module.get_parameter("one.weight").detach().clone()
    heal(module, loss_of, data(), COURSE)
    after = module.get_parameter("one.weight")
    assert (after[:, ::2] == 0).all()
    assert (after[:, 1::2] != before[:, 1::2]).all()


def test_the_cubic_schedule_rises_quickly_at_first_and_ends_where_it_should() -> None:
    shares = [cubic(step, 10, 110, 0.8) for step in range(0, 130, 10)]
    assert shares[:2] == [0, 0] and shares[11:] == [0.8, 0.8]
    assert shares[6] == pytest.approx(0.8 * 7 / 8)
    gains = [b - a for a, b in itertools.pairwise(shares[1:12])]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("goal", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_gradual_pruning_reaches_its_goal_and_never_gives_a_zero_back(goal: dict[str, object]) -> None:
    module = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    schedule = GradualPruning(begin=0.1, end=0.8, every=5, **goal).schedule(module, 100)  # type: ignore[arg-type]
    optimizer, counts, gone = torch.optim.SGD(module.parameters(), lr=0.1), [], torch.zeros(12, 16, dtype=torch.bool)
    weight = module[0].weight
    for step in range(1, 101):
        optimizer.zero_grad()
        module(torch.randn(9, 16)).square().mean().backward()
        optimizer.step()
        schedule.step(step)
        assert (weight.detach()[gone] == 0).all()
        gone = weight.detach() == 0
        counts.append(int(gone.sum()))
    assert counts[8] == 0 < counts[20] < counts[40] <= counts[80] == counts[99]
    if "pattern" in goal:
        assert ((weight.detach().unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    else:
        assert counts[99] == round(0.6 * 192)


@pytest.mark.parametrize(
    "wrong", [{"begin": 0.5, "end": 0.5}, {"sparsity": 1.0}, {"sparsity": 0.5, "pattern": "2:4"}, {"every": 0}], ids=str
)
def test_schedules_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        GradualPruning(**wrong)  # type: ignore[arg-type]
