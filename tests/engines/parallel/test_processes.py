"""Real processes that hold a model together give the tokens that one gives: greedy, 64 of them, in every mixture of four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optkit
from optkit.core.subject import Subject
from optkit.transforms import Compile, Int4

SCRIPT = Path(__file__).parent / "ranks.py"
WANTED = {"batch": 5, "prompt": 9, "tokens": 64, "vocabulary": 96}
MESHES = {"data": [4, 1, 1], "pipeline": [1, 4, 1], "tensor": [1, 1, 4], "data x tensor": [2, 1, 2], "pipeline x tensor": [1, 2, 2]}
MODELS = ["llama", "qwen2", "gpt2", "int4", "int4 by native steps"]


def make(name: str) -> Subject:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}
    family = "llama" if "int4" in name else name
    own = {} if name == "gpt2" else {"num_key_value_heads": 4, "intermediate_size": 256}
    config = AutoConfig.for_model(family, **sizes, **own, hidden_size=128, tie_word_embeddings=name != "llama")
    module: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else None
    subject = Subject(module, source=name)
    if "int4" in name:
        subject = Int4(group_size=32).apply(subject)
    return Compile(backend="native").apply(subject) if "native" in name else subject


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return by model and mesh what each of four processes has answered, and by model and "one" what one process answers."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    jobs, keys = [], []
    for name in MODELS:
        optkit.save(make(name), folder / name)
        for mesh, sizes in MESHES.items():
            if not (sizes[1] > 1 and "native" in name):
                jobs.append((str(folder / name), sizes, WANTED))
                keys.append((name, mesh))
    alone = [(str(folder / name), [1, 1, 1], WANTED) for name in MODELS]
    found = {(name, "one"): part for name, part in zip(MODELS, serve(1, alone, folder), strict=True)}
    return found | dict(zip(keys, serve(4, jobs, folder), strict=True))


def serve(size: int, jobs: list[Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Return for each job what each of so many processes has answered."""
    # The products of AVX2 are the same but for rounding in float32 however many rows there are, and a part has other rows than the whole.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "OPTKIT_KERNELS": "avx2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(size), str(folder / f"meeting-{size}"), json.dumps(jobs)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    return [[output[index] for output in outputs] for index in range(len(jobs))]


CELLS = [(name, mesh) for name in MODELS for mesh in MESHES if not ("pipeline" in mesh and "native" in name)]


@pytest.mark.parametrize(("name", "mesh"), CELLS)
def test_the_tokens_are_those_of_one_process(answers: Callable[..., Any], name: str, mesh: str) -> None:
    one = answers[name, "one"][0]
    for rank in answers[name, mesh]:
        assert rank["tokens"] == one["tokens"]
        for what in ("logits", "scores"):
            off = torch.tensor(rank[what]) - torch.tensor(one[what])
            assert float(off.norm() / torch.tensor(one[what]).norm()) < (1e-3 if "int4" in name else 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_shards_and_stages_hold_a_share_of_the_bytes(answers: Callable[..., Any], name: str) -> None:
    whole = answers[name, "one"][0]["bytes"]
    for mesh in ("tensor", "pipeline"):
        if (name, mesh) in answers:
            assert max(rank["bytes"] for rank in answers[name, mesh]) < 0.6 * whole


def test_native_steps_run_on_shards(answers: Callable[..., Any]) -> None:
    assert "one call of optkit's kernels" in answers["int4 by native steps", "tensor"][0]["engine"]
