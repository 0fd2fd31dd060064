"""A training on two processes ends where one process ends: the same losses and weights but for rounding, and the same in both."""

from __future__ import annotations

import os
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
course = Course(steps=40, learning_rate=1e-2, batch_size=5, length=8, seed=3, accumulation=2)
steps = int(sys.argv[4])
stop = [0]

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


def train(folder: Path, size: int, stop_at: int = 0) -> None:
    command = [sys.executable, "-c", SCRIPT]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    own = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} if size > 1 else {}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), str(stop_at)],
            env={**env, **own, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})},
        )
        for rank in range(size)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * size
    (folder / "meeting").unlink(missing_ok=True)


def test_two_processes_end_where_one_does_also_after_an_interruption(tmp_path: Path) -> None:
    import json

    train(tmp_path, 1)
    train(tmp_path, 2, stop_at=17)
    assert any((tmp_path / "kept").iterdir())
    train(tmp_path, 2)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)
    whole, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name, tensor in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Distill, Qat])
def test_more_processes_than_rows_are_refused(kind: type, subject) -> None:
    with pytest.raises(TransformError, match="8 ranks cannot share batches of 4; use ranks 4, or a larger batch_size"):
        kind(ranks=8, batch_size=4).check(Plan(subject()))
    assert isinstance(subject(), Subject)
