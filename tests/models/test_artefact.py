"""What was saved is what is opened, or it is refused."""

from __future__ import annotations

import json
import resource
import signal
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
from optkit.core import files
from optkit.core.errors import ArtefactError, ModelError, OptkitError
from optkit.core.subject import Subject
from optkit.models.artefact import MANIFEST, distinct_tensors, outline
from optkit.transforms import DropLayers, Int4, Int8, Magnitude

Subjects = Callable[..., Subject]
Logits = Callable[[nn.Module], Tensor]
Edit = Callable[[dict[str, Any]], object]


class TiedNet(nn.Module):
    """A plain module whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids))))  # type: ignore[no-any-return]


@pytest.fixture
def saved(subject: Subjects, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    optkit.save(Int8().apply(subject()), folder)
    return folder


def edit_structure(folder: Path, change: Edit) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and seal the folder anew, as a mistaken writer would."""
    tensors = load_file(folder / "packed.safetensors")
    change(tensors)
    save_file(tensors, folder / "packed.safetensors")
    files.seal(folder, MANIFEST)


def test_everything_about_a_subject_comes_back(subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    whole = subject()
    whole.module.generation_config.max_length = 77  # type: ignore[union-attr]
    done = Int4().apply(Magnitude().apply(DropLayers(layers=(0,)).apply(whole)))
    optkit.save(done, tmp_path / "saved")
    again = optkit.load(tmp_path / "saved")
    fields = ("source", "kind", "trained", "mesh", "history", "execution", "opens_in")
    assert [getattr(again, name) for name in fields] == [getattr(done, name) for name in fields]
    assert again.tokenizer.get_vocab() == done.tokenizer.get_vocab()
    assert again.module.generation_config.max_length == 77  # type: ignore[union-attr]
    assert not again.module.training
    assert torch.equal(logits(again.module), logits(done.module))


def test_what_was_opened_can_be_saved_again_with_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    optkit.save(optkit.load(saved), tmp_path / "again")
    first, second = (json.loads((folder / MANIFEST).read_text()) for folder in (saved, tmp_path / "again"))
    for content in (first, second):
        del content["files"]["tokenizer_config.json"]  # transformers notes there that the folder was local
    assert second == first


def test_it_can_be_saved_after_it_has_run(subject: Subjects, logits: Logits, tmp_path: Path) -> None:
    packed = Int4().apply(subject())
    optkit.save(packed, tmp_path / "before")
    logits(packed.module)
    optkit.save(packed, tmp_path / "after")
    assert files.digest(tmp_path / "before" / "packed.safetensors") == files.digest(tmp_path / "after" / "packed.safetensors")


def test_plain_transformers_refuses_packed_weights_and_opens_no_random_ones(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(layers=[1]),
        lambda content: content.update(history=[{"x": 1}]),
        lambda content: content.update(mesh="x"),
        lambda content: content["mesh"].update(tensor=0),
        lambda content: content.update(source=5),
        lambda content: content.pop("history"),
        lambda content: content["layers"]["lm_head"].pop("layout"),
        lambda content: content["layers"]["lm_head"].update(tied_to="nope"),
        lambda content: content["layers"]["model.embed_tokens"]["layout"].update(x=1),
        lambda content: content["layers"].update({"a.b.c": content["layers"]["model.embed_tokens"]}),
    ],
)
def test_an_edited_structure_is_refused(saved: Path, change: Edit) -> None:
    edit_structure(saved, change)
    for look in (optkit.load, outline):
        with pytest.raises(ArtefactError, match=r"optkit.json"):
            look(saved)


def test_an_artefact_holds_no_format_that_can_run_code(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}


def test_a_large_model_is_saved_in_shards(subject: Subjects, logits: Logits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optkit.models.artefact._SHARD", "100KB")
    whole = subject()
    optkit.save(whole, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(optkit.load(tmp_path / "saved").module), logits(whole.module))


def test_a_folder_that_is_not_empty_is_refused_and_stays(subject: Subjects, saved: Path) -> None:
    before = {path.name: files.digest(path) for path in saved.iterdir()}
    with pytest.raises(ArtefactError, match=r"exists already and is not overwritten"):
        optkit.save(subject(), saved)
    assert {path.name: files.digest(path) for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_is_said_plainly_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, optkit, torch\n"
        "from optkit.core.errors import ResourceError\n"
        "try:\n    optkit.save(torch.nn.Linear(200, 200), sys.argv[1])\n"
        "except ResourceError as error:\n    print(error, error.exit_code)\n"
    )

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert "the file would be larger than allowed" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("4")
    assert list(tmp_path.iterdir()) == []


REFUSALS: dict[str, tuple[Edit, str]] = {
    "newer": (lambda content: content.update(schema=2), "was written in schema 2, this version reads 1; install a newer optkit"),
    "no schema": (lambda content: content.pop("schema"), "does not describe an artefact"),
    "no history": (lambda content: content.pop("history"), "does not describe an artefact: history: Field required"),
    "no layers": (lambda content: content.pop("layers"), "layers: Field required"),
    "unknown layer": (
        lambda content: content["layers"]["lm_head"].update(layer="int9_linear"),
        "unknown layer 'int9_linear'; did you mean",
    ),
    "lost layer": (lambda content: content["layers"].pop("lm_head"), ""),
    "added file": (lambda content: content["files"].update({"x.bin": {"size": 1, "sha256": ""}}), "x.bin: missing"),
}


@pytest.mark.parametrize("name", [name for name in REFUSALS if name != "lost layer"])
def test_a_changed_structure_is_refused(saved: Path, name: str) -> None:
    change, words = REFUSALS[name]
    edit_structure(saved, change)
    with pytest.raises(OptkitError, match=words):
        optkit.load(saved)


def test_no_artefact_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no optkit.json: it is not a finished result"):
        optkit.load(tmp_path)
    with pytest.raises(ArtefactError, match=r"nowhere does not exist"):
        optkit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("place", [0, 1000, -1], ids=["first", "middle", "last"])
def test_a_flipped_bit_of_the_weights_is_found(saved: Path, place: int) -> None:
    path = saved / "packed.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=r"packed.safetensors: changed"):
        optkit.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_cut_weights_that_were_sealed_so_are_refused(saved: Path, share: float) -> None:
    path = saved / "packed.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    files.seal(saved, MANIFEST)
    with pytest.raises(ArtefactError, match=r"packed.safetensors is damaged"):
        optkit.load(saved)


def test_missing_and_extra_tensors_are_named(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"ghost": tensors.pop("model.norm.weight")}))
    with pytest.raises(ArtefactError, match=r"missing \['model.norm.weight'\], unexpected \['ghost'\]"):
        optkit.load(saved)


def test_a_tensor_of_another_shape_is_refused(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ArtefactError, match=r"model.norm.weight is \(3,\), not \(64,\)"):
        optkit.load(saved)


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal"])
def test_a_configuration_that_names_code_is_refused_in_an_artefact_too(saved: Path, key: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: {"AutoModelForCausalLM": "evil.Model"}}))
    files.seal(saved, MANIFEST)
    for look in (optkit.load, outline):
        with pytest.raises(ModelError, match=f"'{key}', which names code to run"):
            look(saved)


def test_a_plain_module_needs_a_fresh_one(mlp: Callable[[], nn.Module], tmp_path: Path) -> None:
    optkit.save(mlp(), tmp_path / "saved")
    with pytest.raises(ModelError, match=r"holds the weights of a Sequential; give a fresh one: load\(folder, into=Sequential"):
        optkit.load(tmp_path / "saved")
    with pytest.raises(ArtefactError, match=r"does not fit its own structure"):
        optkit.load(tmp_path / "saved", into=nn.Linear(4, 4))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "int8"])
def test_ties_of_a_plain_module_come_back(packed: bool, tmp_path: Path) -> None:
    model: nn.Module = TiedNet().eval()
    if packed:
        model = Int8().apply(model)
    ids = torch.arange(20)
    with torch.inference_mode():
        expected = model(ids)
        optkit.save(model, tmp_path / "saved")
        again = optkit.load(tmp_path / "saved", into=TiedNet()).module
        assert torch.equal(again(ids), expected)
    if packed:
        assert again.head.tied is again.embed  # type: ignore[union-attr]
    else:
        assert again.head.weight is again.embed.weight  # type: ignore[union-attr]


def test_a_fresh_module_with_more_blocks_takes_those_that_were_left(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})

    shorter = Int8().apply(DropLayers(layers=(0, 2)).apply(build()))
    optkit.save(shorter, tmp_path / "saved")
    again: Any = optkit.load(tmp_path / "saved", into=build()).module
    assert len(again["blocks"]) == 2
    for mine, theirs in zip(again["blocks"], shorter["blocks"], strict=True):  # type: ignore[index]
        assert torch.equal(mine.weight, theirs.weight)


def test_tensors_without_values_are_counted_one_by_one(subject: Subjects) -> None:
    with torch.device("meta"):
        shapes_only = subject().module
    assert distinct_tensors(shapes_only).keys() == distinct_tensors(subject().module).keys()
    assert "lm_head.weight" not in distinct_tensors(shapes_only)
