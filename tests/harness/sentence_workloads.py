"""A sentence encoder as a workload of one's own: how near its embeddings stay to those of the untouched model, sentence by sentence.

For a model of one's own, with the folder in the environment because a workload takes no arguments:

    SENTENCE_ENCODER=path/to/folder PYTHONPATH=tests/harness python -c "
    import optkit
    report = optkit.run({'name': 'minilm-int8', 'model': 'reference', 'transforms': ['int8'], 'measure': {'quality': {}, 'latency': {}}},
                        workload='sentence_workloads:encoder')"

The recipe's ``model`` is not opened: the workload brings its own.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import DataError
from optkit.models.sources import open_model
from optkit.tasks.loader import Batch, LoaderTask

SENTENCES, TOKENS, BATCH = 200, 48, 20


def encoder() -> tuple[nn.Module, LoaderTask]:
    """The sentence encoder in the folder ``SENTENCE_ENCODER``, on docstrings of the standard library."""
    if "SENTENCE_ENCODER" not in os.environ:
        raise DataError("set SENTENCE_ENCODER to the folder of a sentence encoder")
    subject = open_model(os.environ["SENTENCE_ENCODER"])
    found = subject.tokenizer(docstrings(SENTENCES), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return judged(subject.module, found["input_ids"], found["attention_mask"])


def tiny_encoder() -> tuple[nn.Module, LoaderTask]:
    """A random BERT on random tokens, of which each sentence has another number."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(1, 96, (2 * BATCH, 12))
    mask = (torch.arange(12) < torch.randint(3, 13, (2 * BATCH, 1))).long()
    return judged(BertModel(BertConfig(**sizes, initializer_range=0.2)).eval(), ids, mask)


def judged(module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[nn.Module, LoaderTask]:
    """The module with the task to embed these sentences as it does itself, untouched."""
    batches = []
    with torch.inference_mode():
        for one, there in zip(ids.split(BATCH), mask.split(BATCH), strict=True):
            batch = {"input_ids": one, "attention_mask": there}
            batches.append(batch | {"reference": embeddings(module(**batch), batch)})
    kept = tuple({name: tensor.clone() for name, tensor in batch.items()} for batch in batches)
    return module, LoaderTask(batches=kept, inputs=("input_ids", "attention_mask"), score=cosine, metric="cosine", unit="cosine")


def cosine(output: Any, batch: Batch) -> Tensor:
    """One number a sentence: the cosine of its embedding with that of the untouched model."""
    return (embeddings(output, batch) * batch["reference"]).sum(-1)


def embeddings(output: Any, batch: Batch) -> Tensor:
    """Sentence embeddings of length 1: the mean over the tokens that are there."""
    mask = batch["attention_mask"][..., None].float()
    mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def docstrings(count: int) -> list[str]:
    """First paragraphs of docstrings of the standard library, spread over all of it."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if len(text) > 25:
                    found[text] = None
    step = max(1, len(found) // count)
    return list(found)[::step][:count]
