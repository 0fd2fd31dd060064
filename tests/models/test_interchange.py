"""Folders that other tools wrote, made here by writers of our own: every number arrives, and what is wrong is said by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import ModelError, OptkitError, TargetError
from optkit.kernels.bnb import Bits4Linear
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.llm_int8 import LlmInt8Linear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.models.sources import open_model, outline_model
from optkit.transforms import Int8

Llama = Callable[..., nn.Module]
Logits = Callable[[nn.Module], Tensor]
Parts = dict[str, Tensor]


class Numbers:
    """A quantized weight and, from its law in float64, the weight it stands for."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, symmetric: bool, seed: int, order: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.bits, self.groups = bits, columns // group
        self.q = draw.integers(0, 2**bits, (rows, columns))
        self.point = np.full((rows, self.groups), 2 ** (bits - 1)) if symmetric else draw.integers(1, 2**bits - 1, (rows, self.groups))
        self.scale = (draw.uniform(0.5, 1.5, (rows, self.groups)) * 0.3 / 2**bits).astype(np.float16)
        self.of = np.arange(columns) // group
        if order:
            self.of = draw.permutation(self.of)
        law = (self.q - self.point[:, self.of]) * self.scale.astype(np.float64)[:, self.of]
        self.weight = torch.tensor(law).half()


def words_down(numbers: np.ndarray, bits: int) -> Tensor:
    """Pack along the rows, one number after the other, the first in the lowest bits."""
    each = 32 // bits
    packed = np.zeros((-(-numbers.shape[0] // each), numbers.shape[1]), dtype=np.uint32)
    for row in range(numbers.shape[0]):
        packed[row // each] |= numbers[row].astype(np.uint32) << np.uint32(bits * (row % each))
    return torch.from_numpy(packed.view(np.int32).copy())


def gptq(made: Numbers, version: int) -> Parts:
    parts = {
        "qweight": words_down(made.q.T, made.bits),
        "qzeros": words_down(made.point - (2 - version), made.bits).T.contiguous(),
        "scales": torch.from_numpy(made.scale.T.copy()),
    }
    return parts | {"g_idx": torch.tensor(made.of, dtype=torch.int32)}


def awq(made: Numbers) -> Parts:
    def shuffled(numbers: np.ndarray) -> Tensor:
        eights = numbers.reshape(numbers.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape)
        return words_down(eights.T, 4).T.contiguous()

    return {"qweight": shuffled(made.q.T), "qzeros": shuffled(made.point.T), "scales": torch.from_numpy(made.scale.T.copy())}


def compressed(made: Numbers, pointed: bool) -> Parts:
    parts = {
        "weight_packed": words_down(made.q.T, made.bits).T.contiguous(),
        "weight_scale": torch.from_numpy(made.scale),
        "weight_shape": torch.tensor(made.q.shape),
    }
    return parts | ({"weight_zero_point": words_down(made.point, made.bits)} if pointed else {})


def torchao(made: Numbers) -> Parts:
    half = 2 ** (made.bits - 1)
    signed, point = (torch.tensor(values - half, dtype=torch.int8) for values in (made.q, made.point))
    return {"_weight_qdata": signed, "_weight_scale": torch.from_numpy(made.scale), "_weight_zero_point": point}


def ct_config(format: str = "pack-quantized", inputs: Any = None, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False} | changes


def ao_config(width: str) -> dict[str, Any]:
    data = {"weight_dtype": {"_data": width, "_type": "torch.dtype"}}
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": data}}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# name: the configuration, how a layer is made and written, and the class it becomes
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Numbers], Parts], type[nn.Module]]] = {
    "gptq v1": (gptq_config(), {"group": 32}, lambda made: gptq(made, 1), Int4Linear),
    "gptq v2": (gptq_config(checkpoint_format="gptq_v2"), {"group": 32}, lambda made: gptq(made, 2), Int4Linear),
    "gptq symmetric": (gptq_config(sym=True), {"group": 32, "symmetric": True}, lambda made: gptq(made, 1), Int4Linear),
    "gptq one group": (gptq_config(group_size=-1), {"group": None}, lambda made: gptq(made, 1), Int4Linear),
    "gptq 2 bits": (gptq_config(bits=2), {"group": 32, "bits": 2}, lambda made: gptq(made, 1), Int4Linear),
    "gptq act-order": (gptq_config(desc_act=True), {"group": 32, "order": True}, lambda made: gptq(made, 1), nn.Linear),
    "gptq 8 bits in groups": (gptq_config(bits=8), {"group": 32, "bits": 8}, lambda made: gptq(made, 1), nn.Linear),
    "gptq 8 bits a row": (
        gptq_config(bits=8, group_size=-1),
        {"group": None, "bits": 8, "symmetric": True},
        lambda made: gptq(made, 1),
        Int8Linear,
    ),
    "gptq small groups": (gptq_config(group_size=16), {"group": 16}, lambda made: gptq(made, 1), nn.Linear),
    "awq": (AWQ, {"group": 32}, awq, Int4Linear),
    "compressed-tensors": (ct_config(), {"group": 32, "symmetric": True}, lambda made: compressed(made, False), Int4Linear),
    "compressed-tensors with points": (ct_config(symmetric=False), {"group": 64}, lambda made: compressed(made, True), Int4Linear),
    "compressed-tensors 8 bits": (
        ct_config(num_bits=8),
        {"group": None, "bits": 8, "symmetric": True},
        lambda made: compressed(made, False),
        Int8Linear,
    ),
    "compressed-tensors w8a8": (
        ct_config("int-quantized", TOKEN, num_bits=8),
        {"group": None, "bits": 8, "symmetric": True},
        lambda made: {"weight": torch.tensor(made.q - 128, dtype=torch.int8), "weight_scale": torch.from_numpy(made.scale)},
        W8A8Linear,
    ),
    "torchao int4": (ao_config("int4"), {"group": 32}, torchao, Int4Linear),
    "torchao int8": (ao_config("int8"), {"group": None, "bits": 8, "symmetric": True}, torchao, Int8Linear),
}


@pytest.fixture
def write(tiny_llama: Llama, tokenizer: Any, tmp_path: Path) -> Callable[[str], tuple[Path, nn.Module]]:
    """Return a function that writes a folder in a format, and gives the plain model of the same weights."""

    def make(name: str) -> tuple[Path, nn.Module]:
        config, drawn, written, _ = FORMATS[name]
        plain = tiny_llama(num_hidden_layers=2).half()
        folder = tmp_path / "foreign"
        plain.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
        for seed, (name, layer) in enumerate(layers.items()):
            settings = {"bits": 4, "symmetric": False} | drawn
            settings["group"] = settings["group"] or layer.in_features
            made = Numbers(layer.out_features, layer.in_features, seed=seed, **settings)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in written(made).items()}
            layer.weight.data = made.weight
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit(folder, quantization_config=config)
        return folder, plain

    return make


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_a_foreign_file_arrives(name: str, write: Any, logits: Logits, tmp_path: Path) -> None:
    folder, plain = write(name)
    subject = open_model(str(folder))
    expected = FORMATS[name][3]
    for layer_name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            found = subject.module.get_submodule(layer_name)
            assert type(found) is (nn.Linear if layer_name == "lm_head" else expected)
            assert (found.in_features, found.out_features) == (layer.in_features, layer.out_features)
            assert torch.equal(found.weight, layer.weight)
    told, untouched = logits(subject.module).double(), logits(plain).double()
    rounding = 0.05 if expected is W8A8Linear else 0.01
    assert (told - untouched).abs().max() < rounding * untouched.abs().max()
    assert subject.tokenizer is not None
    (step,) = subject.history
    assert step.settings["layers"] == {expected.__name__: 14}
    assert (step.settings["notes"] == {}) is (expected in (Int4Linear, Int8Linear))
    assert subject.opens_in == "optkit"
    optkit.save(subject, tmp_path / "saved")
    assert torch.equal(logits(optkit.load(tmp_path / "saved").module).double(), told)


@pytest.mark.parametrize("name", FORMATS)
def test_the_outline_foretells_shapes_and_history_without_weights(name: str, write: Any) -> None:
    folder, _ = write(name)
    outline, whole = outline_model(str(folder)), open_model(str(folder))
    assert all(tensor.is_meta for tensor in outline.module.state_dict().values())
    shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in one.module.state_dict().items()} for one in (outline, whole)]
    assert shapes[0] == shapes[1]
    assert outline.history == whole.history


def test_a_packed_baseline_is_not_packed_again(write: Any) -> None:
    folder, _ = write("gptq v1")
    subject = Int8().apply(open_model(str(folder)))  # the head and its embedding are left to pack
    assert type(subject.module.get_submodule("lm_head")) is Int8Linear
    assert [step.name for step in subject.history] == ["from_gptq", "int8"]
    with pytest.raises(TargetError, match="packed already"):
        Int8().apply(subject)


def test_a_head_with_numbers_of_its_own_is_no_longer_tied(write: Any) -> None:
    folder, _ = write("gptq v1")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"lm_head.{key}": tensor for key, tensor in gptq(Numbers(96, 64, 4, 32, False, 99), 1).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    module: Any = open_model(str(folder)).module
    assert type(module.lm_head) is Int4Linear
    assert not module.config.tie_word_embeddings
    assert module.model.embed_tokens.weight.shape == (96, 64)


def drop(key: str) -> Callable[[Parts], object]:
    return lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj.{key}")


def change(key: str, act: Callable[[Tensor], Tensor]) -> Callable[[Parts], object]:
    full = f"model.layers.0.mlp.up_proj.{key}"
    return lambda tensors: tensors.update({full: act(tensors[full]).contiguous()})


BROKEN: dict[str, tuple[str, Callable[[Parts], object], dict[str, Any], str]] = {
    "no qzeros": ("gptq v1", drop("qzeros"), {}, "up_proj.qzeros is missing"),
    "no scales": ("awq", drop("scales"), {}, "up_proj.scales is missing"),
    "no shape": ("compressed-tensors", drop("weight_shape"), {}, "up_proj.weight_shape is missing"),
    "no numbers": ("gptq v1", drop("qweight"), {}, r"1 are missing .*up_proj.weight.* have no place .*up_proj"),
    "numbers cut": ("gptq v1", change("qweight", lambda t: t[:-1]), {}, "up_proj.qweight: 7 words of 32 bits for 64 numbers"),
    "numbers cut across": ("gptq v1", change("qweight", lambda t: t[:, :-1]), {}, "up_proj.qweight is .* expected"),
    "numbers of another kind": ("gptq v1", change("qweight", lambda t: t.float()), {}, "up_proj.qweight is float32, expected int32"),
    "numbers in a row": ("gptq v1", change("qweight", lambda t: t.flatten()), {}, "must be matrices"),
    "numbers in a row, packed": ("compressed-tensors", change("weight_packed", lambda t: t.flatten()), {}, "must be a matrix"),
    "scales of another shape": ("awq", change("scales", lambda t: t[:1]), {}, "up_proj.scales is .* expected"),
    "scales in a row": ("compressed-tensors", change("weight_scale", lambda t: t.flatten()), {}, "up_proj.weight_scale is .* expected"),
    "scales that are infinite": ("gptq v1", change("scales", lambda t: t * torch.inf), {}, "up_proj: scales are NaN or infinite"),
    "a group that is not": ("gptq act-order", change("g_idx", lambda t: t + 7), {}, "groups 0 to 1, but 8 is named"),
    "a group below zero": ("gptq act-order", change("g_idx", lambda t: t - 1), {}, "groups 0 to 1"),
    "a point of version 1 at the edge": ("gptq v1", change("qzeros", lambda t: t | -1), {}, "read as 0 or as 16; save it as gptq_v2"),
    "another shape is told": ("compressed-tensors", change("weight_shape", lambda t: t * 2), {}, r"up_proj.weight_shape is \[256, 128\]"),
    "a bias from nowhere": (
        "gptq v1",
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(128)}),
        {},
        "up_proj.bias is stored, and the model has none",
    ),
    "a tensor from nowhere": (
        "gptq v1",
        lambda t: t.update({"model.surprise": torch.zeros(1)}),
        {},
        r"1 have no place \['model.surprise'\]",
    ),
    "numbers beyond 4 bits": ("torchao int4", change("_weight_qdata", lambda t: t + 50), {}, "numbers beyond 4 bits"),
    "group size 0": ("gptq v1", len, gptq_config(group_size=0), "group_size is 0"),
    "group size below -1": ("gptq v1", len, gptq_config(group_size=-7), "quantization_config: group_size"),
    "group size of awq": ("awq", len, AWQ | {"group_size": 10**12}, "up_proj.qzeros|q_proj.qzeros"),
    "group size in words": ("awq", len, AWQ | {"group_size": "wide"}, "quantization_config: group_size"),
    "3 bits": ("gptq v1", len, gptq_config(bits=3), "GPTQ of 3 bits is not read here"),
    "5 bits": ("gptq v1", len, gptq_config(bits=5), "quantization_config: bits"),
    "another version of gptq": ("gptq v1", len, gptq_config(checkpoint_format="marlin"), "checkpoint_format"),
    "another version of awq": ("awq", len, AWQ | {"version": "gemv"}, "version"),
    "floats of 8 bits": ("compressed-tensors", len, ct_config("float-quantized", type="float"), "'float-quantized' is not read here"),
    "weights of floats": ("compressed-tensors", len, ct_config(type="float"), "weights of type 'float'"),
    "blocks": ("compressed-tensors", len, ct_config(strategy="block"), "strategy 'block'"),
    "a cache scheme": ("compressed-tensors", len, ct_config() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read here"),
    "no groups": ("compressed-tensors", len, ct_config() | {"config_groups": "all"}, "quantization_config: config_groups"),
    "another torchao": (
        "torchao int4",
        len,
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}},
        "torchao 'Float8WeightOnlyConfig' is not read here",
    ),
    "torchao of nothing": ("torchao int4", len, {"quant_method": "torchao", "quant_type": {}}, "quant_type is empty"),
    "an unknown tool": ("gptq v1", len, {"quant_method": "spqr"}, "quantized already, by 'spqr'"),
    "a tool without a name": ("gptq v1", len, {"bits": 4}, "quantized already, by 'None'"),
    "a config that is none": ("gptq v1", len, [4], "quantized already|cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_foreign_folder_is_refused_by_name(name: str, write: Any) -> None:
    format, act, config, words = BROKEN[name]
    folder, _ = write(format)
    tensors = load_file(folder / "model.safetensors")
    act(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        edit(folder, quantization_config=config)
    with pytest.raises(ModelError, match=words) as caught:
        open_model(str(folder))
    assert str(folder) in str(caught.value)


def test_only_pickles_are_refused_and_nothing_quantized_too(write: Any, model_folder: Path) -> None:
    folder, _ = write("awq")
    edit(model_folder, quantization_config=AWQ)
    with pytest.raises(ModelError, match="no layer of it is quantized"):
        open_model(str(model_folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is not opened, because its format can run code"):
        open_model(str(folder))


def test_cut_foreign_weights_are_refused(write: Any) -> None:
    folder, _ = write("awq")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OptkitError, match=r"model\.safetensors is damaged"):
        open_model(str(folder))


@pytest.mark.parametrize(("kind", "expected"), [("nf4", Bits4Linear), ("fp4", Bits4Linear), ("int8", LlmInt8Linear)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_transformers_wrote_by_bitsandbytes_opens_with_its_logits_and_is_saved_as_it_was(
    kind: str, expected: type[nn.Module], family: str, tiny_llama: Llama, logits: Logits, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    dense = tiny_llama(num_hidden_layers=2) if family == "llama" else GPT2LMHeadModel(GPT2Config(**small))
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32)
    made.save_pretrained(tmp_path / "foreign")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", dtype="auto").eval()
    subject = open_model(str(tmp_path / "foreign"))
    assert subject.history[0].settings["layers"] == {expected.__name__: 14 if family == "llama" else 8}
    answers = logits(theirs)
    assert torch.equal(logits(subject.module), answers)
    optkit.save(subject, tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("foreign", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()), answers)
    foretold = outline_model(str(tmp_path / "foreign")).module.state_dict()
    assert {key: tensor.shape for key, tensor in foretold.items()} == {key: t.shape for key, t in subject.module.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "act", "words"),
    [
        ("weight.absmax", lambda t: t[:-1], "absmax is .* expected"),
        ("weight", lambda t: t[:-2], "weight is .* expected"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:20], "its quant_state cannot be read"),
        (
            "weight.quant_state.bitsandbytes__nf4",
            lambda t: torch.full((9000,), 91, dtype=torch.uint8),
            "its quant_state cannot be read",
        ),
        ("weight.quant_map", None, "weight.quant_map is missing"),
    ],
)
def test_broken_files_of_bitsandbytes_are_refused_by_name(
    key: str, act: Callable[[Tensor], Tensor] | None, words: str, subject: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from optkit.transforms import Nf4

    optkit.save(Nf4().apply(subject()), tmp_path / "saved")
    (tmp_path / "saved" / "optkit.json").unlink()
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    full = f"model.layers.0.mlp.up_proj.{key}"
    tensors = {name: tensor for name, tensor in tensors.items() if name != full} | ({} if act is None else {full: act(tensors[full])})
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        open_model(str(tmp_path / "saved"))
