"""The one door to every model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optkit
from optkit.core.errors import ModelError
from optkit.core.subject import Subject
from optkit.models.shapes import SHAPES, Shape, config_of
from optkit.models.sources import REFERENCE, local_folder, open_model, outline_model
from optkit.transforms import Int8

SMALL = Shape(layers=2, hidden_size=64, heads=4, kv_heads=2, vocabulary=96, max_positions=64)


def sizes(subject: Subject) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in subject.module.state_dict().items()}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shape:llama-1bb", r"unknown shape 'llama-1bb'; did you mean 'llama-1b'\?"),
        ("shape:", "unknown shape ''; known: "),
        ("./nowhere", r"model folder './nowhere' does not exist; known sources: reference, shape:NAME"),
        ("/no/where", "does not exist"),
        ("~/no-such-folder", "does not exist"),
        ("nothing", "does not exist"),
        ("a/b/c", "does not exist"),
        ("", "does not exist|config.json"),
        ("x" * 5000, "is no name of a folder"),
        ("~no-such-user/x", "is no name of a folder"),
    ],
)
def test_what_is_no_model_is_refused(spec: str, words: str) -> None:
    for look in (open_model, outline_model):
        with pytest.raises(ModelError, match=words):
            look(spec)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; give the folder that holds"):
        open_model(str(tmp_path / "model.safetensors"))


def test_the_bundled_model_is_a_folder_with_all_that_is_needed() -> None:
    assert local_folder("reference") == REFERENCE
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in REFERENCE.iterdir()}
    outline = outline_model("reference")
    assert outline.source == "reference"
    assert 14e6 < sum(parameter.numel() for parameter in outline.module.parameters()) < 14.5e6
    assert all(parameter.is_meta for parameter in outline.module.parameters())


def test_the_bundled_model_opens_with_its_tokenizer() -> None:
    subject = open_model("reference")
    assert subject.trained
    text = "def add(x, y):\n    return x + y\n"
    assert subject.tokenizer.decode(subject.tokenizer(text).input_ids) == text


def test_random_weights_say_so_and_are_the_same_for_the_same_seed() -> None:
    first, same, other = (open_model(SMALL, seed=seed) for seed in (1, 1, 2))
    assert not first.trained
    assert first.source == "shape:llama-2x64"
    assert first.tokenizer is None
    weights = [subject.module.state_dict()["model.layers.0.mlp.up_proj.weight"] for subject in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_shape_has_the_sizes_that_were_asked_for(family: Any) -> None:
    shape = SMALL.model_copy(update={"family": family, "intermediate_size": 160})
    outline = outline_model(shape)
    assert sizes(outline) == sizes(open_model(shape))
    config = outline.module.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size) == (2, 64, 4, 96)  # type: ignore[union-attr]
    assert any(160 in shape for shape in sizes(outline).values())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-1m", 1.312),
        ("llama-5m", 5.05),
        ("llama-25m", 26.83),
        ("llama-260m", 258.3),
        ("llama-135m", 134.5),
        ("llama-1b", 1100.0),
        ("gpt2", 124.4),
        ("qwen2.5-0.5b", 494.0),
    ],
)
def test_a_named_shape_has_the_parameters_of_its_namesake(name: str, millions: float) -> None:
    assert set(SHAPES) == {"llama-1m", "llama-5m", "llama-25m", "llama-260m", "llama-135m", "llama-1b", "gpt2", "qwen2.5-0.5b"}
    outline = outline_model(f"shape:{name}")
    assert sum(parameter.numel() for parameter in outline.module.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert config_of(SHAPES[name]).vocab_size == SHAPES[name].vocabulary


def test_an_artefact_is_recognized_in_both_ways(subject: Callable[..., Subject], tmp_path: Path) -> None:
    packed = Int8().apply(subject())
    optkit.save(packed, tmp_path / "packed")
    opened, outline = open_model(str(tmp_path / "packed")), outline_model(str(tmp_path / "packed"))
    assert opened.history == outline.history == packed.history
    assert sizes(opened) == sizes(outline) == sizes(packed)
    assert all(tensor.is_meta for tensor in outline.module.state_dict().values())
