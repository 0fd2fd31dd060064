"""Export as compressed-tensors: read again by our own reader always, by plain transformers where compressed-tensors is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import ArtefactError, ModelError
from optkit.core.subject import Subject
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.models.interchange.export import export_compressed_tensors
from optkit.models.interchange.words import pack_words, unpack_words
from optkit.models.sources import open_model
from optkit.transforms import Dtype, Int4, Int8, Nf4

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]


def whole_points(subject: Subject, symmetric: bool) -> Subject:
    """Give every int4 layer whole zero points, as a fit without real-valued ones has them."""
    for layer in subject.module.modules():
        if type(layer) is Int4Linear:
            point = layer.tensors()[2]
            layer.register_buffer("point", torch.full_like(point, 8) if symmetric else point.round().clamp(0, 15))
    return subject


def rounded_inputs(subject: Subject, scale: float | None) -> Subject:
    for name, layer in list(subject.module.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            subject.module.get_submodule(parent).register_module(attribute, W8A8Linear.from_linear(layer, scale))
    return subject


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run packed layers in plain PyTorch, so that the kernels' rounding of activations stays out of the comparison."""
    monkeypatch.setattr("optkit.kernels.packed.native", lambda: None)


CASES: dict[str, Callable[[Subjects], Subject]] = {
    "int8, tied head": lambda make: Int8().apply(make()),
    "int8, own head, biases": lambda make: Int8().apply(make(tie_word_embeddings=False, attention_bias=True)),
    "int8, bfloat16": lambda make: Int8().apply(Dtype(dtype="bfloat16").apply(make())),
    "int4": lambda make: whole_points(Int4().apply(make()), True),
    "int4, int8 head": lambda make: whole_points(Int4(group_size=32).apply(make(tie_word_embeddings=False)), True),
    "int4 with points": lambda make: whole_points(Int4().apply(make()), False),
    "w8a8, static": lambda make: rounded_inputs(make(), 0.05),
    "w8a8, dynamic": lambda make: rounded_inputs(make(), None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_exported_is_read_again_number_for_number(name: str, subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    packed = CASES[name](subject)
    export_compressed_tensors(packed, tmp_path / "out")
    again = open_model(str(tmp_path / "out"))
    for layer_name, layer in packed.module.named_modules():
        if isinstance(layer, nn.Linear):
            found = again.module.get_submodule(layer_name)
            assert torch.equal(found.weight.to(layer.weight.dtype), layer.weight)
            assert layer_name == "lm_head" or type(found) is type(layer)
    assert again.tokenizer is not None
    if name != "int8, bfloat16":  # there the scales need float32, and so does the exported model
        assert torch.allclose(logits(again.module), logits(packed.module), atol=1e-4)
    else:
        assert again.module.config.dtype is torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_opens_an_export_with_equal_weights(name: str, subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = CASES[name](subject)
    card = export_compressed_tensors(packed, tmp_path / "out")
    needed = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "dequantize=True" in card else {}
    with warnings.catch_warnings(action="ignore"):  # that the folder has a configuration already, which is what is asked for
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", **needed).eval()
    answers = logits(plain)  # the first forward unpacks the weights
    for layer_name, layer in packed.module.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(plain.get_submodule(layer_name).weight.to(layer.weight.dtype), layer.weight)
    if "w8a8" not in name and "bfloat16" not in name:
        assert torch.allclose(answers, logits(packed.module), atol=1e-4)


def test_the_folder_holds_what_its_loader_looks_for_and_a_card(subject: Subjects, tmp_path: Path) -> None:
    export_compressed_tensors(CASES["int4, int8 head"](subject), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    groups = list(config["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] == [4, 8]
    assert groups[1]["targets"] == ["lm_head"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj"
    assert tensors[f"{up}.weight_packed"].shape == (128, 8)
    assert tensors[f"{up}.weight_shape"].tolist() == [128, 64]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "21 linear layers in int4, groups of 32" in card
    assert "no smaller memory, no faster tokens" in card


def test_real_valued_points_are_refused_by_name_and_nothing_is_written(subject: Subjects, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"21 layers .* model.layers.0.self_attn.q_proj: .*no whole numbers.*symmetric: true"):
        export_compressed_tensors(Int4().apply(subject()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_points_beside_another_scheme_are_refused(subject: Subjects, tmp_path: Path) -> None:
    packed = whole_points(Int4().apply(subject(tie_word_embeddings=False)), False)
    with pytest.raises(ModelError, match="has zero points and lm_head is stored otherwise"):
        export_compressed_tensors(packed, tmp_path / "out")


def test_what_cannot_be_exported_is_refused(subject: Subjects, mlp: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no layer of this model is packed"):
        export_compressed_tensors(subject(), tmp_path / "out")
    with pytest.raises(ModelError, match="only transformers models can be exported; this is a Sequential"):
        export_compressed_tensors(Subject(module=mlp(), source="mlp", kind="module"), tmp_path / "out")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ModelError, match=r"a layer of bitsandbytes; optkit.save writes it"):
        export_compressed_tensors(Nf4().apply(subject()), tmp_path / "out")


def test_a_folder_that_holds_something_is_not_overwritten(subject: Subjects, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    with pytest.raises(ArtefactError, match="not overwritten"):
        export_compressed_tensors(Int8().apply(subject()), tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_unpacked_as_they_were_packed(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (5, 37), dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(numbers, bits), bits)[:, :37], numbers)


def test_the_command_exports_an_artefact_and_says_who_gains_what(subject: Subjects, tmp_path: Path) -> None:
    optkit.save(Int8().apply(subject()), tmp_path / "saved")
    command = [sys.executable, "-m", "optkit", "export", str(tmp_path / "saved"), "--format", "compressed-tensors", "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Who gains what" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    again: Any = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr
