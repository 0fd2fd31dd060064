"""Twelve architectures by ten transforms of weights: every cell works from apply to greedy tokens, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optkit
from optkit.core.errors import OptkitError, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.engines import EagerEngine, KvCacheEngine
from optkit.kernels.packed import PackedLinear
from optkit.models.sources import outline_model
from optkit.transforms import DropLayers, Dtype, Int4, Int8, KvCache, LlmInt8, Magnitude, Nf4, Plan, Transform

VOCABULARY = 96
LAYERS = 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "llama": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", GROUPED | {"use_sliding_window": True, "sliding_window": 8, "layer_types": KINDS}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS}),
    "phi3": ("Phi3Config", GROUPED),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "olmo2": ("Olmo2Config", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
TRANSFORMS: dict[str, Transform] = {
    "dtype": Dtype(dtype="bfloat16"),
    "int8": Int8(),
    "int4": Int4(group_size=32),
    "hqq": Int4(group_size=32, method="hqq"),
    "awq": Int4(group_size=32, method="awq"),
    "gptq": Int4(group_size=32, method="gptq"),
    "nf4": Nf4(),
    "llm_int8": LlmInt8(),
    "magnitude": Magnitude(),
    "drop_layers": DropLayers(layers=(1,)),
}
EXPERTS = "cannot reach 3 layers .*MixtralExperts.*exclude"
PACKING = ("int8", "int4", "hqq", "awq", "gptq", "nf4", "llm_int8")
REFUSED = {("mixtral", transform): EXPERTS for transform in (*PACKING, "magnitude")}
REFUSED[("opt", "nf4")] = "project_in: block_size 64 does not divide in_features 32; exclude"
REMEDY = {"mixtral": Targets(exclude=("*.experts",)), "opt": Targets(exclude=("*.project_in",))}
CELLS = [(model, transform) for model in ARCHITECTURES for transform in TRANSFORMS]
WORKING = [cell for cell in CELLS if cell not in REFUSED]
Greedy = Callable[[Subject, Tensor, int], tuple[Tensor, Tensor]]
Logits = Callable[[nn.Module], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:awq. nothing can take a scale:optkit.core.errors.OptkitWarning")


def build(name: str) -> nn.Module:
    import transformers

    kind, values = ARCHITECTURES[name]
    torch.manual_seed(0)
    module: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).eval()
    return module


def check_whole_way(transform: Transform, name: str, folder: Path, logits: Logits, data: Calibration) -> tuple[Subject, Tensor]:
    """Check on shapes, apply, save, open again: shapes as foretold, logits equal and not those of the untouched model."""
    with torch.device("meta"):
        outline = Subject(build(name), name)
        transform.check(Plan(outline))
        foretold = transform.preview(outline).module.state_dict()
    whole = Subject(build(name), name)
    untouched = logits(whole.module)
    changed = transform.apply(whole, data)
    assert {key: tensor.shape for key, tensor in changed.module.state_dict().items()} == {
        key: tensor.shape for key, tensor in foretold.items()
    }
    answers = logits(changed.module)
    assert torch.isfinite(answers).all()
    assert not torch.equal(answers, untouched)
    optkit.save(changed, folder)
    again = optkit.load(folder)
    assert torch.equal(logits(again.module), answers)
    assert outline_model(str(folder)).history == again.history == changed.history
    return again, answers


def check_greedy(subject: Subject, prompt: Tensor, greedy: Greedy) -> None:
    """Four tokens from the engine, with its cache, are those of full forwards.

    Packed layers may round the activations of many rows to bfloat16 and those of few rows not: there a tie may fall the other way,
    and each token of the engine must only be as likely as the best one within what the rounding moves.
    """
    by_engine, by_full_forwards = greedy(subject, prompt, 4)
    if any(isinstance(layer, PackedLinear) for layer in subject.module.modules()):
        with torch.inference_mode():
            logits = subject.module(input_ids=torch.cat([prompt, by_engine], 1), use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        chosen = logits.gather(-1, by_engine[..., None])[..., 0]
        assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()
    else:
        assert torch.equal(by_engine, by_full_forwards)


@pytest.mark.parametrize(("name", "transform"), WORKING, ids=["-".join(cell) for cell in WORKING])
def test_a_cell_works_the_whole_way(
    name: str, transform: str, ids: Tensor, logits: Logits, greedy: Greedy, calibration: Calibration, tmp_path: Path
) -> None:
    again, answers = check_whole_way(TRANSFORMS[transform], name, tmp_path / "saved", logits, calibration)
    if TRANSFORMS[transform].opens_in == "transformers":
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
        assert torch.equal(logits(plain), answers)
    if transform != "dtype":
        check_greedy(again, ids, greedy)


@pytest.mark.parametrize(("name", "transform"), list(REFUSED), ids=["-".join(cell) for cell in REFUSED])
def test_a_cell_is_refused_by_name_on_shapes_alone_and_before_a_weight_changes(name: str, transform: str) -> None:
    with torch.device("meta"), pytest.raises(OptkitError, match=REFUSED[name, transform]):
        TRANSFORMS[transform].check(Plan(Subject(build(name), name)))
    module = build(name)
    with pytest.raises(TransformError, match=REFUSED[name, transform]):
        TRANSFORMS[transform].apply(module)
    fresh = build(name).state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize(("name", "transform"), list(REFUSED), ids=["-".join(cell) for cell in REFUSED])
def test_a_refused_cell_works_with_the_remedy_that_its_message_names(
    name: str, transform: str, ids: Tensor, logits: Logits, greedy: Greedy, calibration: Calibration, tmp_path: Path
) -> None:
    remedied = TRANSFORMS[transform].model_copy(update={"targets": REMEDY[name]})
    again, _ = check_whole_way(remedied, name, tmp_path / "saved", logits, calibration)
    check_greedy(again, ids, greedy)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates_from_a_quantized_cache(name: str, ids: Tensor) -> None:
    with torch.device("meta"):
        KvCache(bits=4).check(Plan(Subject(build(name), name)))
    module = build(name)
    plain, recent, rounded = EagerEngine(module), KvCacheEngine(module, bits=4, keep_recent=32), KvCacheEngine(module, bits=8)
    expected, equal, near = (
        torch.stack([engine.prefill(ids), *(engine.step(column) for column in ids.T)]) for engine in (plain, recent, rounded)
    )
    assert torch.equal(equal, expected)  # and so the cache is the model's own, windows included
    assert 0 < (near - expected).norm() < 0.05 * expected.norm()
    assert rounded.cache_bytes() < 0.4 * plain.cache_bytes()


def test_the_table_has_twelve_rows_and_ten_columns_and_few_refusals() -> None:
    assert len(CELLS) == 120
    assert len(REFUSED) == 9
