"""nf4 and llm_int8: which layers they take, which they leave alone, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.kernels.bnb import Bits4Linear, BitsandbytesLinear
from optkit.kernels.llm_int8 import LlmInt8Linear
from optkit.measure.traffic import weight_bytes_per_token
from optkit.transforms import Dtype, Int8, LlmInt8, Nf4, Transform

pytest.importorskip("bitsandbytes")
Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]
BOTH: list[type[Transform]] = [Nf4, LlmInt8]


def replaced(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, BitsandbytesLinear)]


@pytest.mark.parametrize("kind", BOTH)
def test_the_head_and_its_embedding_stay_unless_asked_for(kind: type[Transform], subject: Subjects) -> None:
    for tied in (True, False):
        names = replaced(kind().apply(subject(tie_word_embeddings=tied)).module)
        assert len(names) == 21
        assert "lm_head" not in names
    assert "lm_head" in replaced(kind(head=True).apply(subject(tie_word_embeddings=False)).module)  # type: ignore[call-arg]
    with pytest.raises(TransformError, match=r"lm_head: it shares its weight with model.embed_tokens.*head: false"):
        kind(head=True).apply(subject())  # type: ignore[call-arg]
    with pytest.raises(TransformError, match=r"only the output head lm_head is selected.*head: true"):
        kind(targets=Targets(include=("lm_head",))).apply(subject(tie_word_embeddings=False))  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", BOTH)
def test_patterns_select_and_a_pattern_of_nothing_is_an_error(kind: type[Transform], subject: Subjects) -> None:
    chosen = replaced(kind(targets=Targets(include=("*.mlp.*",), exclude=("*.0.*",))).apply(subject()).module)  # type: ignore[call-arg]
    assert len(chosen) == 6
    assert all(".mlp." in name and ".0." not in name for name in chosen)
    with pytest.raises(TargetError, match="no_such"):
        kind(targets=Targets(include=("no_such",))).apply(subject())  # type: ignore[call-arg]
    with pytest.raises(TargetError, match="packed already"):
        Int8(targets=Targets(exclude=("lm_head",))).apply(kind().apply(Int8().apply(subject())))


def test_odd_widths_are_refused_by_name_before_a_weight_changes(subject: Subjects) -> None:
    odd = subject(intermediate_size=96)
    before = {key: tensor.clone() for key, tensor in odd.module.state_dict().items()}
    with pytest.raises(
        TransformError, match=r"down_proj: block_size 64 does not divide in_features 96.*3 of 21.*exclude: \['\*.down_proj'\]"
    ):
        Nf4().apply(odd)
    assert all(torch.equal(tensor, before[key]) for key, tensor in odd.module.state_dict().items())
    assert len(replaced(Nf4(targets=Targets(exclude=("*.down_proj",))).apply(odd).module)) == 18
    assert len(replaced(LlmInt8().apply(subject(intermediate_size=97)).module)) == 21


@pytest.mark.parametrize("kind", BOTH)
def test_conv1d_becomes_linear_with_the_weight_turned(kind: type[Transform], logits: Logits, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    module = GPT2LMHeadModel(GPT2Config(**small, initializer_range=0.2)).eval()
    wide = module.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    dense = logits(module)
    changed = kind().apply(Subject(module=module, source="gpt2"))
    layer: Any = changed.module.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert (layer.weight - wide).norm() < 0.12 * wide.norm()
    answers = logits(changed.module)
    assert 0 < (answers - dense).norm() < 0.3 * dense.norm()
    optkit.save(changed, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()), answers)


def test_settings_reach_the_layers_and_the_config_that_transformers_reads(subject: Subjects, tmp_path: Path) -> None:
    fp4 = Nf4(format="fp4", double_quant=False, block_size=128, targets=Targets(include=("*.down_proj",))).apply(subject())
    layer: Any = fp4.module.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, Bits4Linear)
    assert (layer.format, layer.double_quant, layer.block_size) == ("fp4", False, 128)
    optkit.save(fp4, tmp_path / "fp4")
    told = json.loads((tmp_path / "fp4" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["load_in_4bit"], told["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "fp4")
    assert len(told["llm_int8_skip_modules"]) == 19
    int8 = LlmInt8(threshold=3.5).apply(subject())
    optkit.save(int8, tmp_path / "int8")
    told = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert (told["load_in_8bit"], told["llm_int8_threshold"], told["llm_int8_skip_modules"]) == (True, 3.5, ["lm_head"])
    again: Any = optkit.load(tmp_path / "int8").module.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(again, LlmInt8Linear)
    assert again.threshold == 3.5


def test_in_bfloat16_it_opens_in_transformers_with_equal_logits(subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for number, steps in enumerate(
        [[Dtype(dtype="bfloat16"), Nf4()], [Nf4(), Dtype(dtype="bfloat16")], [LlmInt8(), Dtype(dtype="bfloat16")]]
    ):
        changed = subject()
        for step in steps:
            changed = step.apply(changed)
        answers = logits(changed.module)
        optkit.save(changed, tmp_path / str(number))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype="auto").eval()
        assert torch.equal(logits(plain), answers)
        assert torch.equal(logits(optkit.load(tmp_path / str(number)).module), answers)


def test_beside_layers_of_ours_the_artefact_needs_optkit_and_says_so(subject: Subjects, tmp_path: Path) -> None:
    mixed = Int8().apply(Nf4(targets=Targets(include=("*.mlp.*",))).apply(subject()))
    assert mixed.opens_in == "optkit"
    optkit.save(mixed, tmp_path / "mixed")
    assert (tmp_path / "mixed" / "packed.safetensors").exists()
    assert "quantization_config" not in json.loads((tmp_path / "mixed" / "config.json").read_text())


def test_bytes_per_token_shrink(subject: Subjects) -> None:
    whole = weight_bytes_per_token(subject(hidden_size=128, intermediate_size=256).module)
    nf4, int8 = (weight_bytes_per_token(kind().apply(subject(hidden_size=128, intermediate_size=256)).module) for kind in BOTH)
    assert nf4 < int8 < whole / 2


def test_settings_are_checked_before_bitsandbytes_is_imported() -> None:
    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from optkit.transforms import Nf4, LlmInt8, Plan\n"
        "from optkit.core.subject import Subject\n"
        "with torch.device('meta'):\n"
        "    for kind in (Nf4, LlmInt8):\n"
        "        outline = Subject(nn.Sequential(nn.Linear(64, 64)), 'plain', 'module')\n"
        "        kind().check(Plan(outline)); kind().preview(outline)\n"
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
