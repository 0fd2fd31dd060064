"""Networks that are trained here: once, found again, resumed after an interruption, and measured by recipes like any other model."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optkit
from optkit.core.errors import OptkitError, ProblemsError
from optkit.harness import teaching
from optkit.harness.lesson import train
from optkit.harness.teaching import is_taught, taught
from optkit.models import artefact
from optkit.models.networks import Training
from optkit.models.networks.bilstm import Bilstm
from optkit.recipe.yaml_writing import to_yaml
from optkit.tasks.text_classification import LabelledFiles, TextClassification

WORDS = {"fruit": ["apple", "pear", "plum"], "tool": ["saw", "drill", "file"]}
NETWORK = Bilstm(embedding_size=16, hidden_size=16, training=Training(steps=60, check_every=20, learning_rate=0.01))

OPEN_AGAIN = """
import json, sys, torch
import optkit

torch.set_num_threads(1)
module = optkit.load(sys.argv[1]).module
ids = torch.arange(24).view(2, 12)
with torch.inference_mode():
    logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()
print(json.dumps({"class": type(module).__name__, "logits": logits}))
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelledFiles:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    with (tmp_path / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"the {WORDS[label][n % 3]} number {n}", label] for n in range(120) for label in WORDS)
    return LabelledFiles(files=(str(tmp_path / "own.csv"),))


def recipe(corpus: LabelledFiles, **changes: Any) -> dict[str, Any]:
    model = {"bilstm": NETWORK.model_dump(mode="json")}
    task = {"text-classification": {"corpus": corpus.model_dump(mode="json"), "length": 12}}
    measure = {"latency": {"seconds": 0.3}, "memory": {}, "quality": {}}
    return {"name": "own", "threads": 1, "model": model, "task": task, "transforms": ["int8"], "measure": measure} | changes


def test_a_network_is_trained_once_and_opens_in_another_process(corpus: LabelledFiles, tmp_path: Path) -> None:
    task = TextClassification(corpus=corpus, length=12)
    told: list[str] = []
    assert not is_taught(NETWORK, task, 0)
    found = taught(NETWORK, task, 0, told.append)
    assert any("step 60 of 60" in text for text in told)
    assert is_taught(NETWORK, task, 0) and not is_taught(NETWORK, task, 1)
    told.clear()
    assert taught(NETWORK, task, 0, told.append) == found and told == []
    subject = artefact.load(found.artefact)
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        expected = subject.module(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()
    done = subprocess.run([sys.executable, "-c", OPEN_AGAIN, str(found.artefact)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"class": "BilstmClassifier", "logits": expected}


def test_an_interrupted_training_goes_on_and_ends_in_the_same_weights(corpus: LabelledFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TextClassification(corpus=corpus, length=12)
    whole = artefact.load(taught(NETWORK, task, 0, lambda text: None).artefact).module.state_dict()
    whole = {name: tensor.clone() for name, tensor in whole.items()}

    class StopError(Exception):
        pass

    class Stopping(teaching._Best):
        def look(self, step: int) -> None:
            super().look(step)
            if step == 35:
                raise StopError

    place = teaching._place(NETWORK, task, 0)
    place.rename(place.with_suffix(".first"))
    heal = teaching.heal
    monkeypatch.setattr(teaching, "heal", lambda *given, **named: heal(*given, **named, keep_every_s=0))
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(teaching, "_Best", Stopping)
        taught(NETWORK, task, 0, lambda text: None)
    told: list[str] = []
    again = artefact.load(taught(NETWORK, task, 0, told.append).artefact).module.state_dict()
    assert any("going on after step 34" in text for text in told)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert not place.with_suffix(".work").exists()


def test_a_training_ends_early_where_it_gets_no_better(corpus: LabelledFiles) -> None:
    wild = Bilstm(embedding_size=8, hidden_size=8, training=Training(steps=400, check_every=10, patience=2, learning_rate=0.5))
    record = taught(wild, TextClassification(corpus=corpus, length=12), 0, lambda text: None).record
    assert record["steps"] < 400
    assert record["best"]["loss"] == min(look["loss"] for look in record["looks"])


def test_train_sets_the_network_against_the_trivial_answer(corpus: LabelledFiles, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(to_yaml(recipe(corpus)))
    found = train(tmp_path / "own.yaml")
    accuracy = next(score.compared for score in found.scores if score.compared.metric == "accuracy")
    assert accuracy.after > 0.9 > accuracy.before and accuracy.verdict == "better"
    assert "always" in found.to_markdown() and json.loads(found.to_json())["network"] == "bilstm"


@pytest.mark.slow
def test_a_recipe_trains_its_network_first_and_measures_it(corpus: LabelledFiles, tmp_path: Path) -> None:
    said: list[str] = []
    report = optkit.run(recipe(corpus), out=tmp_path / "out", progress=lambda text, share: said.append(text))
    assert any("training bilstm" in text for text in said)
    assert report.arms["optimized"].metrics["accuracy"].value > 0.9
    assert report.arms["optimized"].metrics["agreement"].value > 0.9
    assert {"latency_ms", "items_per_second", "f1", "f1_fruit"} <= report.arms["baseline"].metrics.keys()
    again = optkit.load(tmp_path / "out" / "own" / "0001" / "artefact")
    assert [step.name for step in again.history] == ["int8"]


def test_what_a_network_cannot_do_is_refused_by_name(corpus: LabelledFiles, tmp_path: Path) -> None:
    with pytest.raises(OptkitError, match=r"a network is trained on a task with right answers.* text-classification"):
        optkit.run(recipe(corpus, task=None), out=tmp_path)
    with pytest.raises(ProblemsError, match="asks for answers per item"):
        optkit.run(recipe(corpus, model="lstm-forecaster"), out=tmp_path)
    with pytest.raises(
        OptkitError, match="text-classification is for models that only run forward, and this is one of the models that go on"
    ):
        optkit.run(recipe(corpus, model="reference"), out=tmp_path)
    (tmp_path / "own.yaml").write_text(to_yaml(recipe(corpus, model="reference", task=None)))
    with pytest.raises(OptkitError, match="'reference' is no network that is trained here"):
        train(tmp_path / "own.yaml")


def test_settings_of_judging_alone_train_nothing_anew(corpus: LabelledFiles) -> None:
    taught(NETWORK, TextClassification(corpus=corpus, length=12), 0, lambda text: None)
    assert is_taught(NETWORK, TextClassification(corpus=corpus, length=12, called={"tool": "TOOL"}), 0)
    assert not is_taught(NETWORK, TextClassification(corpus=corpus, length=13), 0)
