"""A training on two processes ends where one process ends: the same losses and weights but for rounding, and the same in both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.transforms import Distill, Plan, Qat

SCRIPT = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_file

from optkit.core.group import Group
from optkit.core.subject import Calibration
from optkit.transforms.training.loop import Course, heal

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    PartialState(cpu=True)
torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
batches = tuple({"x": torch.randn(5, 6), "y": torch.randn(5, 3)} for _ in range(4))
data = Calibration(batches, group=Group(rank, size), checkpoints=folder / "kept" if size > 1 else None)
steps, sharded = int(sys.argv[4]), sys.argv[5] == "sharded"
course = Course(steps=40, learning_rate=1e-2, batch_size=5, length=8, seed=3, accumulation=2, sharded=sharded)
student[0].weight.data[:, 1] = 0  # pruned

def loss_of(module, batch):
    return (module(batch["x"]) - batch["y"]).square().mean()

class Stop(Exception):
    pass

def after(step):
    if step == steps:
        raise Stop

try:
    losses = heal(student, loss_of, data, course, after, keep_every_s=0)
except Stop:
    sys.exit(0)
save_file(student.state_dict(), folder / f"{size}-{rank}.safetensors")
(folder / f"{size}-{rank}.json").write_text(json.dumps(losses))
"""


def train(folder: Path, size: int, stop_at: int = 0, how: str = "whole") -> None:
    command = [sys.executable, "-c", SCRIPT]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    own = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} if size > 1 else {}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), str(stop_at), how],
            env={**env, **own, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})},
        )
        for rank in range(size)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * size
    (folder / "meeting").unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_two_processes_end_where_one_does_also_after_an_interruption(tmp_path: Path, how: str) -> None:
    train(tmp_path, 1)
    train(tmp_path, 2, stop_at=17, how=how)
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "kept").rglob("step-0000016"))
    assert kept == (["kept/rank-0/step-0000016", "kept/rank-1/step-0000016"] if how == "sharded" else ["kept/step-0000016"])
    if how == "sharded":
        shares = [load_file(tmp_path / name / "tensors.safetensors") for name in kept]
        assert [share["model.shares.0"].shape for share in shares] == [(8, 6), (8, 6)]  # of the weight of 16 rows
        assert [share["optimizer.0.exp_avg"].shape for share in shares] == [(8, 6), (8, 6)]
        shutil.rmtree(tmp_path / "kept/rank-1/step-0000016")  # killed before it had kept its share: both go on from step 15
    train(tmp_path, 2, how=how)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)
    whole, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert not whole["0.weight"][:, 1].any() and not first["0.weight"][:, 1].any()
    for name, tensor in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Distill, Qat])
def test_more_processes_than_rows_are_refused(kind: type, subject) -> None:
    with pytest.raises(TransformError, match="8 ranks cannot share batches of 4; use ranks 4, or a larger batch_size"):
        kind(ranks=8, batch_size=4).check(Plan(subject()))
    assert isinstance(subject(), Subject)


def test_shares_of_weights_need_several_processes_and_no_schedule_of_zeros(subject) -> None:
    for kind in (Distill, Qat):
        with pytest.raises(TransformError, match="one rank has no other"):
            kind(sharded=True).check(Plan(subject()))
    with pytest.raises(TransformError, match="leave out one"):
        Distill(sharded=True, ranks=2, gradual={"sparsity": 0.5}).check(Plan(subject()))
