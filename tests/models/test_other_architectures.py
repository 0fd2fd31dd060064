"""Encoders, encoders with a decoder, recurrent and plain PyTorch models by five transforms: every cell works, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optkit
from optkit.core.errors import OptkitError, TransformError
from optkit.core.subject import Subject
from optkit.core.targets import Targets
from optkit.kernels.gru import Int8GRU
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.lstm import Int8LSTM
from optkit.kernels.packed import PackedLinear
from optkit.models.architectures import kind_of
from optkit.models.sources import open_model, outline_model
from optkit.transforms import DropLayers, Dtype, Int4, Int8, Magnitude, Plan, Transform

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # by its own fast path
VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 128, "num_layers": 3, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0}
BART: dict[str, Any] = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
        {"layers": 3, "attention_heads": 4, "ffn_dim": 128}.items()}  # fmt: skip
PRETRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", COMMON),
    "BertForMaskedLM": ("BertConfig", COMMON),
    "RobertaForSequenceClassification": ("RobertaConfig", COMMON),
    "DistilBertModel": ("DistilBertConfig", {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4}),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        COMMON | {"sep_token_id": 1, "cls_token_id": 1, "global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "T5EncoderModel": ("T5Config", T5),
    "BartForConditionalGeneration": (
        "BartConfig",
        BART | {"vocab_size": VOCABULARY, "d_model": 64, "scale_embedding": True, "max_position_embeddings": 64, "init_std": 0.1},
    ),
}
PLAIN = ("LSTMClassifier", "BidirectionalLSTMClassifier", "GRUClassifier", "TransformerClassifier")
ARCHITECTURES = (*PRETRAINED, *PLAIN)
TRANSFORMS: dict[str, Transform] = {
    "dtype": Dtype(dtype="bfloat16"),
    "int8": Int8(),
    "int4": Int4(group_size=32),
    "magnitude": Magnitude(),
    "drop_layers": DropLayers(layers=(1,)),
}
CELLS = [(model, transform) for model in ARCHITECTURES for transform in TRANSFORMS]
ATTENTION = r"cannot reach 3 layers .*MultiheadAttention.*exclude: \['\*.self_attn'\]"
WITHOUT_ATTENTION = {"targets": Targets(exclude=("*.self_attn",))}
WITHOUT_RECURRENT = {"targets": Targets(exclude=("recurrent",))}
REFUSED: dict[tuple[str, str], tuple[str, dict[str, Any] | None]] = {
    ("T5ForConditionalGeneration", "drop_layers"): (
        r"several lists of 3 blocks: encoder.block, decoder.block; name one: stack: encoder.block",
        {"stack": "encoder.block"},
    ),
    ("BartForConditionalGeneration", "drop_layers"): (
        r"several lists of 3 blocks: model.encoder.layers, .*stack: model.encoder.layers",
        {"stack": "model.encoder.layers"},
    ),
    **{("TransformerClassifier", one): (ATTENTION, WITHOUT_ATTENTION) for one in ("int8", "int4", "magnitude")},
    **{
        (f"{name}Classifier", one): (rf"cannot reach 1 layers .*recurrent \({kind}.*exclude: \['recurrent'\]", WITHOUT_RECURRENT)
        for name, kind in (("LSTM", "LSTM"), ("BidirectionalLSTM", "LSTM"), ("GRU", "GRU"))
        for one in ("int4", "magnitude")
    },
    **{(f"{name}Classifier", "drop_layers"): ("has no list of repeated blocks", None) for name in ("LSTM", "BidirectionalLSTM", "GRU")},
}  # fmt: skip
WORKING = [cell for cell in CELLS if cell not in REFUSED]
REMEDIED = [cell for cell, (_, remedy) in REFUSED.items() if remedy is not None]
OPEN_AGAIN = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
import optkit
from test_other_architectures import PRETRAINED, answers, build

torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
for cell, expected in load_file(root / "kept.safetensors").items():
    name = cell.partition("-")[0]
    subject = optkit.load(root / cell, into=None if name in PRETRAINED else build(name, seed=1))
    found[cell] = torch.equal(answers(subject.module), expected)
print(json.dumps(found))
"""


class RecurrentClassifier(nn.Module):
    """Token ids to an embedding, through recurrent layers, to three classes by the mean over time."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.recurrent = kind(32, 64, num_layers=2, batch_first=True, bidirectional=bidirectional)  # type: ignore[call-overload,arg-type]
        self.classify = nn.Linear(128 if bidirectional else 64, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.classify(self.recurrent(self.embed(input_ids))[0].mean(1)),)


class TransformerClassifier(nn.Module):
    """The same with PyTorch's own encoder, whose fast path runs in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 3)
        self.classify = nn.Linear(64, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encode(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return (self.classify((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)),)


def build(name: str, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    if name in PRETRAINED:
        kind, values = PRETRAINED[name]
        pretrained: nn.Module = getattr(transformers, name)(getattr(transformers, kind)(**values)).eval()
        return pretrained
    if name == "TransformerClassifier":
        return TransformerClassifier().eval()
    return RecurrentClassifier(nn.GRU if name.startswith("GRU") else nn.LSTM, name.startswith("Bidirectional")).eval()


def answers(module: nn.Module) -> Tensor:
    """Return the first output for two sequences, one of them padded."""
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids[:, :5]
    with torch.inference_mode():
        found: Tensor = module(**batch)[0]
    return found.contiguous()


def subject_of(name: str) -> Subject:
    module = build(name)
    return Subject(module, name, kind=kind_of(module))


def remedied(cell: tuple[str, str]) -> Transform:
    return TRANSFORMS[cell[1]].model_copy(update=REFUSED[cell][1] if cell in REFUSED else {})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    """Save a subject of each cell, open all of them in one new process, and return the folder and whose answers are equal there."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("artefacts")
    kept = {}
    for cell in (*WORKING, *REMEDIED):
        changed = remedied(cell).apply(subject_of(cell[0]))
        kept["-".join(cell)] = answers(changed.module)
        optkit.save(changed, root / "-".join(cell))
    save_file(kept, root / "kept.safetensors")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{OPEN_AGAIN}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return root, found


@pytest.mark.parametrize("cell", [*WORKING, *REMEDIED], ids="-".join)
def test_a_cell_works_from_apply_to_equal_answers_in_a_new_process(cell: tuple[str, str], opened: tuple[Path, dict[str, bool]]) -> None:
    name, transform = cell
    root, equal = opened
    with torch.device("meta"):
        outline = subject_of(name)
        remedied(cell).check(Plan(outline))
        foretold = remedied(cell).preview(outline).module.state_dict()
    changed = remedied(cell).apply(subject_of(name))
    state = changed.module.state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: tensor.shape for key, tensor in foretold.items()}
    found, untouched = answers(changed.module), answers(build(name))
    assert torch.isfinite(found).all()
    assert not torch.equal(found, untouched)
    if transform in ("dtype", "int8"):
        assert (found.float() - untouched).norm() < 0.05 * untouched.norm()
    assert equal["-".join(cell)]
    if name in PRETRAINED:
        import transformers

        shapes = outline_model(str(root / "-".join(cell)))
        assert shapes.history == changed.history
        assert shapes.kind == changed.kind == kind_named(name)
        if TRANSFORMS[transform].opens_in == "transformers":
            plain = getattr(transformers, name).from_pretrained(root / "-".join(cell), dtype="auto").eval()
            assert torch.equal(answers(plain), found)


@pytest.mark.parametrize("cell", list(REFUSED), ids="-".join)
def test_a_cell_is_refused_by_name_on_shapes_alone_and_before_a_weight_changes(cell: tuple[str, str]) -> None:
    name, transform = cell
    with torch.device("meta"), pytest.raises(OptkitError, match=REFUSED[cell][0]):
        TRANSFORMS[transform].check(Plan(subject_of(name)))
    module = build(name)
    with pytest.raises(TransformError, match=REFUSED[cell][0]):
        TRANSFORMS[transform].apply(module)
    fresh = build(name).state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in module.state_dict().items())


def test_the_table_has_twelve_rows_and_five_columns() -> None:
    assert len(CELLS) == 60
    assert len(WORKING) == 46


def kind_named(name: str) -> str:
    """Return the kind of a class: one with an encoder that writes answers texts, the others only run forward."""
    return "seq2seq-lm" if name.endswith("ForConditionalGeneration") else "module"


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_folder_of_transformers_opens_as_the_class_that_it_names(name: str, tmp_path: Path) -> None:
    module = build(name)
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    subject = open_model(str(tmp_path / "model"))
    assert type(subject.module) is type(module)
    assert (subject.kind, outline_model(str(tmp_path / "model")).kind) == (kind_named(name), kind_named(name))
    assert torch.equal(answers(subject.module), answers(module))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_encoder_that_names_no_class_opens_without_a_head_and_never_loses_one(tmp_path: Path) -> None:
    for name in ("BertModel", "BertForMaskedLM"):
        build(name).save_pretrained(tmp_path / name)  # type: ignore[operator]
        edit_config(tmp_path / name, architectures=None)
    assert type(open_model(str(tmp_path / "BertModel")).module).__name__ == "BertModel"
    with pytest.raises(OptkitError, match=r"lack|BertModel has no place for \d+ of its tensors, such as cls"):
        open_model(str(tmp_path / "BertForMaskedLM"))


@pytest.mark.parametrize(
    "named", ["AutoModel", "PreTrainedModel", "modeling_utils", "os.system", "__class__", "LlamaModel", "Bert Model", ""]
)
def test_a_name_that_is_no_public_class_for_the_configuration_is_refused(named: str, tmp_path: Path) -> None:
    build("BertModel").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    edit_config(tmp_path / "model", architectures=[named])
    for look in (open_model, outline_model):
        with pytest.raises(OptkitError, match=f"names the architecture '{named}', which transformers has no public class of for 'bert'"):
            look(str(tmp_path / "model"))


def test_an_artefact_opens_no_class_but_a_public_one(tmp_path: Path) -> None:
    optkit.save(build("BertModel"), tmp_path / "saved")
    manifest = tmp_path / "saved" / "optkit.json"
    manifest.write_text(manifest.read_text().replace('"BertModel"', '"PreTrainedModel"'))
    with pytest.raises(OptkitError, match="holds the weights of a PreTrainedModel; give a fresh one"):
        optkit.load(tmp_path / "saved")


def test_a_class_of_ones_own_is_not_mistaken_for_that_of_transformers(tmp_path: Path) -> None:
    import transformers

    class BertModel(transformers.BertModel):  # type: ignore[misc]
        """Has a layer more than its namesake."""

    module = BertModel(transformers.BertConfig(**COMMON)).eval()
    optkit.save(module, tmp_path / "saved")
    with pytest.raises(OptkitError, match="give a fresh one"):
        optkit.load(tmp_path / "saved")
    again = optkit.load(tmp_path / "saved", into=BertModel(transformers.BertConfig(**COMMON)))
    assert torch.equal(answers(again.module), answers(module))


def test_embeddings_of_encoders_stay_as_they_are_where_no_head_shares_them() -> None:
    for name in ("BertModel", "RobertaForSequenceClassification", "DistilBertModel", "T5EncoderModel", "LSTMClassifier"):
        module = Int8().apply(build(name))
        assert any(type(layer) is nn.Embedding for layer in module.modules())
        assert not any(isinstance(layer, Int8Embedding) for layer in module.modules())


def test_one_packed_embedding_serves_encoder_decoder_and_head_and_is_saved_once(opened: tuple[Path, dict[str, bool]]) -> None:
    root, _ = opened
    module: Any = optkit.load(root / "T5ForConditionalGeneration-int8").module
    assert isinstance(module.shared, Int8Embedding)
    assert module.encoder.embed_tokens is module.decoder.embed_tokens is module.shared is module.lm_head.tied
    tables = [
        key for key in load_file(root / "T5ForConditionalGeneration-int8" / "packed.safetensors") if "shared" in key or "embed_tok" in key
    ]
    assert sorted(tables) == ["shared.qweight", "shared.scale"]
    bart: Any = optkit.load(root / "BartForConditionalGeneration-int8").module
    assert bart.model.encoder.embed_tokens.multiplier == 8


def test_a_packed_layer_is_saved_with_the_same_bytes_after_it_has_run(tmp_path: Path) -> None:
    for name in ("T5ForConditionalGeneration", "BidirectionalLSTMClassifier"):
        packed = Int8().apply(build(name))
        optkit.save(packed, tmp_path / name / "before")
        answers(packed)
        optkit.save(packed, tmp_path / name / "after")
        before, after = ((tmp_path / name / when / "packed.safetensors").read_bytes() for when in ("before", "after"))
        assert before == after


def test_the_first_block_of_t5_holds_the_positions_and_is_not_dropped(tmp_path: Path) -> None:
    first = DropLayers(layers=(0,), stack="encoder.block")
    with pytest.raises(TransformError, match=r"blocks of encoder.block are not alike: without \[0\].*layers: \[2\]"):
        first.check(Plan(subject_of("T5ForConditionalGeneration")))
    with pytest.raises(TransformError, match=r"stack 'decoder' is no list of repeated blocks; there are: encoder.block, decoder.block"):
        DropLayers(stack="decoder").check(Plan(subject_of("T5ForConditionalGeneration")))
    module: Any = DropLayers(layers=(1, 2), stack="decoder.block").apply(build("T5ForConditionalGeneration"))
    assert (module.config.num_layers, module.config.num_decoder_layers) == (3, 1)
    optkit.save(module, tmp_path / "saved")
    assert torch.equal(answers(optkit.load(tmp_path / "saved").module), answers(module))


def test_recurrent_layers_are_packed_and_stay_findable_with_their_true_sizes() -> None:
    for name, kind, plain in (("LSTMClassifier", Int8LSTM, nn.LSTM), ("GRUClassifier", Int8GRU, nn.GRU)):
        layer: Any = Int8().apply(build(name)).recurrent  # type: ignore[union-attr]
        assert type(layer) is kind
        assert isinstance(layer, plain)
        assert (layer.input_size, layer.hidden_size, layer.num_layers, layer.batch_first) == (32, 64, 2, True)
        assert sum(isinstance(part, Int8Linear) for part in layer.modules()) == 4


def test_a_recurrent_layer_alone_is_packed_too() -> None:
    layer = Int8().apply(nn.LSTM(32, 64))
    assert isinstance(layer, Int8LSTM)
    Int8().check(Plan(Subject(nn.LSTM(32, 64), "lstm", kind="module")))


def test_a_projection_is_refused_by_name_and_left_alone_when_excluded() -> None:
    model = nn.ModuleDict({"recurrent": nn.LSTM(32, 64, proj_size=16), "last": nn.Linear(16, 4)})
    words = r"int8 cannot pack recurrent: a LSTM with a projection \(proj_size 16\).*exclude: \['recurrent'\]"
    with pytest.raises(TransformError, match=words):
        Int8().check(Plan(Subject(model, "own", kind="module")))
    packed = Int8(targets=Targets(exclude=("recurrent",))).apply(model)
    assert isinstance(packed["last"], Int8Linear)  # type: ignore[index]
    assert type(packed["recurrent"]) is nn.LSTM  # type: ignore[index]


def test_a_plain_rnn_is_refused_by_name() -> None:
    model = nn.ModuleDict({"recurrent": nn.RNN(32, 64), "last": nn.Linear(64, 4)})
    with pytest.raises(TransformError, match=r"int8 cannot reach 1 layers .*recurrent \(RNN.*exclude: \['recurrent'\]"):
        Int8().apply(model)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_the_encoder_of_pytorch_runs_its_packed_layers_and_no_fused_operator(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = build("TransformerClassifier"), build("TransformerClassifier")
    packed = Int8(targets=Targets(exclude=("*.self_attn",))).apply(packed)
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, PackedLinear):
                dense.get_submodule(name).weight.copy_(layer.weight)  # type: ignore[operator]
    assert sum(isinstance(layer, PackedLinear) for layer in packed.modules()) == 2 * 3 + 1
    assert type(packed.encode.layers[0].self_attn.out_proj) is not Int8Linear  # type: ignore[union-attr,index]
    with torch.no_grad():
        packed(*2 * [torch.ones(1, 2, dtype=torch.long)])  # the layouts of the kernels are made at the first call
    calls: list[nn.Module] = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    ids, mask = torch.randint(2, VOCABULARY, (2, 12)), torch.ones(2, 12)
    with torch.set_grad_enabled(grad):
        found, expected = packed(ids, mask)[0], dense(ids, mask)[0]
    assert len(calls) == 7
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_t5_reads_the_dtype_of_a_packed_weight_without_dequantizing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Int8().apply(build("T5ForConditionalGeneration"))
    answers(packed)
    calls: list[Callable[..., Tensor]] = []
    if any(layer.plan is not None for layer in packed.modules() if isinstance(layer, Int8Linear)):
        monkeypatch.setattr(Int8Linear, "dequantize", lambda self, dtype: calls.append(self))
        answers(packed)
    assert calls == []
