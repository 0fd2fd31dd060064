"""Layers that wait on disk: they are not in memory, and the answers are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import optkit
from optkit.core.errors import ArtefactError
from optkit.core.subject import Subject
from optkit.engines import engine_for, told
from optkit.engines.offloading import bytes_by_place, placement
from optkit.models.sources import open_model
from optkit.transforms import Offload

PEAK = """
import json, sys
import torch
import optkit
from optkit.engines import engine_for
from optkit.measure.memory import forget_peak, peak_bytes, resident_bytes

before = resident_bytes()
subject = optkit.load(sys.argv[1])
opening = peak_bytes() - before
forget_peak()
engine = engine_for(subject)
tokens = [engine.prefill(torch.arange(8)[None]).argmax(-1)]
for _ in range(8):
    tokens.append(engine.step(tokens[-1]).argmax(-1))
print(json.dumps({"opening": opening, "serving": peak_bytes() - before, "tokens": torch.cat(tokens).tolist()}))
"""


def test_blocks_stay_whole_and_the_limit_holds_with_the_layer_being_read(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama(num_hidden_layers=6, tie_word_embeddings=False)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())  # type: ignore[union-attr,operator]
    limit = 5 * block
    placed = placement(model, limit, None)
    held = bytes_by_place(model, placed)
    assert held["cpu"] + block <= limit
    assert held["disk"] > 0
    assert all(name.count(".") <= 2 for name in placed)  # model.layers.3, and nothing in it apart


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_partly_on_disk_gives_the_tokens_of_the_whole(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, tied: bool
) -> None:
    model = tiny_llama(num_hidden_layers=6, tie_word_embeddings=tied)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    optkit.save(Offload(host_memory=total // 2).apply(Subject(model, "tiny")), tmp_path / "kept")
    opened = optkit.load(tmp_path / "kept")
    on_disk = [name for name, parameter in opened.module.named_parameters() if parameter.is_meta]
    assert len(on_disk) > 9
    engines = engine_for(Subject(model, "tiny")), engine_for(opened)
    prompt = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        assert torch.equal(engines[0].score(prompt), engines[1].score(prompt))  # type: ignore[union-attr]
    whole, parted = ([first := e.first(prompt), *e.further(first, 5)] for e in engines)  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(whole, parted, strict=True))
    assert "weights on" in str(told(engines[1])) and "disk: " in str(told(engines[1]))
    assert [name for name, parameter in opened.module.named_parameters() if parameter.is_meta] == on_disk
    with pytest.raises(ArtefactError, match="not in memory"):
        optkit.save(opened, tmp_path / "again")
    whole_again = open_model(str(tmp_path / "kept"))  # to be changed
    assert not any(parameter.is_meta for parameter in whole_again.module.parameters())


@pytest.mark.slow
def test_what_is_on_disk_takes_no_memory(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=96)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {}
    for name, subject in (("whole", Subject(model, "tiny")), ("parted", Offload(host_memory=total // 3).apply(Subject(model, "tiny")))):
        optkit.save(subject, tmp_path / name)
        done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    assert found["parted"]["tokens"] == found["whole"]["tokens"]
    for when in ("opening", "serving"):
        assert found["whole"][when] - found["parted"][when] > total // 2
