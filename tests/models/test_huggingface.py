"""Folders in Hugging Face format: what is wrong with one is said plainly, and no code of it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optkit.core.errors import MissingError, ModelError, OptkitError
from optkit.models.sources import open_model, outline_model

Change = Callable[[Path], object]


def edit_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(act: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def cut(share: float) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil(value: float) -> Change:
    return edit_weights(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(value))


def remote_code(folder: Path) -> None:
    edit_config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")


CASES: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"[:1]), "config.json cannot be read"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "the configuration of model .* cannot be read"),
    "unknown architecture": (edit_config(model_type="no-such-model"), "no-such-model"),
    "a class of another type": (edit_config(model_type="bert"), "names the architecture 'LlamaForCausalLM', which .* no public class of"),
    "a class of no type": (edit_config(model_type="vit", architectures=["ViTForEverything"]), "'ViTForEverything', which .* for 'vit'"),
    "quantized already": (edit_config(quantization_config={"quant_method": "eetq"}), "quantized already, by 'eetq'"),
    "a size that makes no sense": (edit_config(hidden_size="wide"), "cannot be|hidden_size"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*.safetensors$"),
    "only pickles": (only_pickles, "pytorch_model.bin is not opened, because its format can run code: convert it to safetensors"),
    "cut weights": (cut(0.7), "cannot be opened"),
    "cut header": (cut(0.001), "cannot be opened"),
    "empty weights": (cut(0), "cannot be opened"),
    "NaN": (spoil(float("nan")), "NaN or infinite weights in 1 tensors, the first is model.layers.1.mlp.up_proj.weight"),
    "infinity": (spoil(float("-inf")), "NaN or infinite weights in 1 tensors"),
    "a missing tensor": (edit_weights(lambda tensors: tensors.__delitem__("model.norm.weight")), "lack 1 tensors .*model.norm.weight"),
    "another shape": (edit_config(intermediate_size=256), "of another shape than its config.json says, such as"),
    "weights of another folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}})),
        "names weights outside the model folder: '../other.safetensors'",
    ),
    "remote code": (remote_code, "contains 'auto_map', which names code to run; --trust-remote-code allows it"),
    "remote code, deeper": (edit_config(text_config={"auto_map": {"AutoModel": "x.Y"}}), "config.json:text_config contains 'auto_map'"),
    "a kernel of the Hub": (edit_config(_attn_implementation_internal="someone/attention"), "contains '_attn_implementation_internal'"),
    "trust in the config": (edit_config(trust_remote_code=True), "contains 'trust_remote_code', which names code to run$"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "the tokenizer of model .* cannot be opened",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_folder_is_refused_with_the_reason(model_folder: Path, name: str) -> None:
    change, words = CASES[name]
    change(model_folder)
    before = {path.name for path in model_folder.iterdir()}
    with pytest.raises(ModelError if "JSON" not in name else OptkitError, match=words) as caught:
        open_model(str(model_folder))
    assert caught.value.exit_code == 2
    assert str(model_folder) in str(caught.value)
    assert {path.name for path in model_folder.iterdir()} == before


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_experts_implementation_internal", "trust_remote_code"])
def test_some_keys_are_refused_even_with_the_flag(model_folder: Path, key: str) -> None:
    edit_config(**{key: "someone/code"})(model_folder)
    for look in (open_model, outline_model):
        with pytest.raises(ModelError, match=f"contains '{key}', which names code to run$"):
            look(str(model_folder), trust_remote_code=True)


def test_the_outline_refuses_what_opening_refuses(model_folder: Path) -> None:
    for change, words in (
        (edit_config(model_type="bert"), "names the architecture 'LlamaForCausalLM', which transformers has no public class of for 'bert'"),
        (remote_code, "contains 'auto_map'"),
    ):
        change(model_folder)
        with pytest.raises(ModelError, match=words):
            outline_model(str(model_folder))


def test_a_good_folder_opens_in_the_type_it_is_stored_in(model_folder: Path, logits: Callable[[nn.Module], Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    half.save_pretrained(model_folder)
    subject = open_model(str(model_folder))
    assert {parameter.dtype for parameter in subject.module.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(subject.module), logits(half))
    assert subject.source == "model"
    assert subject.trained
    assert not subject.module.training
    assert subject.tokenizer.decode(subject.tokenizer("def x").input_ids) == "def x"


def test_a_decoder_whose_class_has_an_older_spelling_opens_as_a_causal_model(model_folder: Path) -> None:
    edit_config(architectures=["LLaMAForCausalLM"])(model_folder)
    subject = open_model(str(model_folder))
    assert (type(subject.module).__name__, subject.kind) == ("LlamaForCausalLM", "causal-lm")
    assert outline_model(str(model_folder)).kind == "causal-lm"


def test_a_folder_without_tokenizer_opens_without_one(model_folder: Path) -> None:
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert open_model(str(model_folder)).tokenizer is None


def test_a_sharded_folder_opens_and_lacks_nothing(model_folder: Path, tiny_llama: Callable[..., Any]) -> None:
    (model_folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(model_folder, max_shard_size="100KB")
    shards = sorted(model_folder.glob("*.safetensors"))
    assert len(shards) > 1
    open_model(str(model_folder))
    shards[1].unlink()
    with pytest.raises(ModelError):
        open_model(str(model_folder))


def test_a_name_of_the_hub_is_refused_quickly_when_offline() -> None:
    started = time.monotonic()
    for look in (open_model, outline_model):
        with pytest.raises(MissingError, match="'someone/model' is no folder here, and the Hub cannot be reached"):
            look("someone/model")
    assert time.monotonic() - started < 10


def test_a_hub_that_does_not_answer_is_refused_within_seconds() -> None:
    code = (
        "import time, optkit.models.sources as sources\n"
        "from optkit.core.errors import MissingError\n"
        "import transformers\n"
        "started = time.monotonic()\n"
        "try:\n    sources.outline_model('someone/model')\n"
        "except MissingError as error:\n    print(f'{time.monotonic() - started:.1f} {error}')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert "the Hub cannot be reached" in done.stdout, done.stderr
    assert float(done.stdout.split()[0]) < 12


def test_a_configuration_of_the_hub_that_names_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig(auto_map={"AutoModelForCausalLM": "own.Own"}))
    with pytest.raises(ModelError, match=r"'someone/model': .* contains 'auto_map', which names code to run; --trust-remote-code"):
        outline_model("someone/model")
