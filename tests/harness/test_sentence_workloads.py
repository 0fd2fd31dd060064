"""A sentence encoder that no recipe can name, measured by how near its embeddings stay to those of the untouched model."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentence_workloads
import torch

import optkit
from optkit.core.errors import DataError
from optkit.core.group import Group
from optkit.core.subject import Subject
from optkit.engines import EagerForward
from optkit.transforms import Int8


def test_the_untouched_encoder_is_its_own_like_and_the_packed_one_comes_near() -> None:
    module, task = sentence_workloads.tiny_encoder()
    found = {}
    for name, changed in (("before", module), ("after", Int8().apply(sentence_workloads.tiny_encoder()[0]))):
        subject = Subject(changed, "tiny", kind="module")
        found[name] = torch.as_tensor(task.evaluate(subject, EagerForward(changed), Group(), None, None)["score"])
    torch.testing.assert_close(found["before"], torch.ones(40, dtype=torch.float64))
    assert 0.995 < found["after"].min() < found["after"].max() < 1 - 1e-7


def test_a_whole_run_drops_a_layer_of_it_packs_the_rest_and_reports_the_cosine(tmp_path: Path) -> None:
    recipe = {"name": "tiny", "model": "reference", "threads": 1, "measure": {"quality": {}}, "limits": {"cosine": 0.1}}
    recipe["transforms"] = [{"drop_layers": {"layers": [1]}}, "int8"]
    report = optkit.run(recipe, out=tmp_path, workload="sentence_workloads:tiny_encoder")
    before, after = (report.arms[name].metrics["cosine"].value for name in ("baseline", "optimized"))
    assert before == pytest.approx(1)
    assert 0.1 < (after or 0) < 0.999
    assert report.held


def test_a_folder_is_embedded_on_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "return", "the", "a", "of", "is"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="set SENTENCE_ENCODER"):
        sentence_workloads.encoder()
    monkeypatch.setenv("SENTENCE_ENCODER", str(tmp_path))
    module, task = sentence_workloads.encoder()
    assert type(module).__name__ == "BertModel"
    assert sum(len(batch["reference"]) for batch in task.batches) == 200
    assert len(set(sentence_workloads.docstrings(200))) == 200
