"""Every transform on every network that is trained here: it works, and the model still answers; or it is refused by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optkit.core.errors import OptkitError, OptkitWarning
from optkit.core.subject import Calibration, Subject
from optkit.models.networks import NETWORKS, described
from optkit.transforms import TRANSFORMS, Plan
from optkit.transforms.tracing import answer_of

README = Path(__file__).parent.parent / "README.md"
SMALL: dict[str, dict[str, Any]] = {
    "bilstm": {"embedding_size": 32, "hidden_size": 32},
    "encoder": {"hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 128},
    "gpt2": {"hidden_size": 64, "layers": 3, "heads": 4},
    "lstm-forecaster": {"hidden_size": 32},
    "seq2seq": {"hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 128},
    "seq2seq, bart": {"shape": "bart", "hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 128},
    "transformer-forecaster": {"hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 128},
}
NEEDS: dict[str, dict[str, Any]] = {
    "bilstm": {"per": "item", "vocabulary": 96, "labels": ["a", "b", "c"], "positions": 16},
    "encoder": {"per": "item", "vocabulary": 96, "labels": ["a", "b", "c"], "positions": 16},
    "gpt2": {"per": "text", "vocabulary": 96, "end": 0, "positions": 64},
    "lstm-forecaster": {"per": "window", "channels": 2, "window": 8, "horizon": 3},
    "seq2seq": {"per": "answer", "vocabulary": 96, "end": 0, "positions": 16},
    "seq2seq, bart": {"per": "answer", "vocabulary": 96, "end": 0, "positions": 16},
    "transformer-forecaster": {"per": "window", "channels": 2, "window": 8, "horizon": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "merge": {"models": ("./other",)},
    "ensemble": {"models": ("./other",)},
    "prune_ffn": {"multiple": 16},
    "prune_heads": {},
    "prune_hidden": {"ratio": 0.5, "multiple": 32},
    "low_rank": {"method": "plain"},
    "distill": {"steps": 2},
    "dtype": {"dtype": "bfloat16"},
    "mixed": {"layers": {"*": "int8"}},
    "qat": {"steps": 2},
    "adaptive": {"ways": ({"bits": 8},), "batch_sizes": (1,), "prompt_tokens": (8,), "most_perplexity": 2.0},
    "data_parallel": {"size": 2},
    "tensor_parallel": {"size": 2},
    "pipeline_parallel": {"size": 2},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "seq2seq": {"drop_layers": {"stack": "encoder.block"}},
    "seq2seq, bart": {"drop_layers": {"stack": "model.encoder.layers"}},
    "encoder": {"prune_heads": {"in_config": False}, "nf4": {"targets": {"exclude": ("classifier",)}}},
    "transformer-forecaster": {
        "prune_channels": {"targets": {"include": ("up",)}},
        **{name: {"targets": {"exclude": ("entry", "head")}} for name in ("int4", "qat", "nf4")},
    },
}
NOT_HERE = {"merge", "ensemble"}  # they need another model
AFTER = {"sparse": "magnitude"}  # what a transform stands on


def batches(network: str) -> tuple[dict[str, Tensor], ...]:
    draw = torch.Generator().manual_seed(0)
    if "forecaster" in network:
        return tuple({"values": torch.randn(8, 8, 2, generator=draw)} for _ in range(4))
    ids = [torch.randint(1, 96, (8, 16), generator=draw) for _ in range(4)]
    if network == "gpt2":
        return tuple({"input_ids": rows} for rows in ids)
    found = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
    return tuple(batch | ({"labels": batch["input_ids"][:, :6].contiguous()} if network.startswith("seq2seq") else {}) for batch in found)


def subject_of(network: str) -> Subject:
    torch.manual_seed(0)
    settings = NETWORKS[network.partition(",")[0]](**SMALL[network])
    module = settings.build(NEEDS[network]).eval()
    return Subject(module, network, kind=settings.kind, network=described(settings, NEEDS[network]))


@cache
def outcome(transform: str, network: str) -> str | None:
    """Return why a transform is refused on a network, or None where it works: the model answers as before in shape, with numbers."""
    subject = subject_of(network)
    data = Calibration(batches(network), untouched=lambda: subject_of(network).module, open_model=lambda spec: subject_of(network).module)
    before = answer_of(subject.module, dict(data.batches[0]))
    step = TRANSFORMS[transform](**(SETTINGS.get(transform, {}) | OWN.get(network, {}).get(transform, {})))
    try:
        if transform in AFTER:
            subject = TRANSFORMS[AFTER[transform]]().apply(subject, data)
        step.check(Plan(subject, (1, 8), 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptkitWarning)
            after = step.apply(replace(subject), data)
    except OptkitError as error:
        return str(error)
    dtype = next(parameter.dtype for parameter in [*after.module.parameters(), *after.module.buffers()] if parameter.is_floating_point())
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in data.batches[0].items()}
    found = answer_of(after.module, batch)
    assert found.shape == before.shape and torch.isfinite(found).all()
    return None


@pytest.mark.parametrize("network", sorted(SMALL))
@pytest.mark.parametrize("transform", sorted(set(TRANSFORMS) - NOT_HERE))
def test_a_transform_works_on_a_network_or_says_why_not(transform: str, network: str) -> None:
    reason = outcome(transform, network)
    assert reason is None or len(reason.split()) > 5


def test_every_network_is_tried() -> None:
    assert {network.partition(",")[0] for network in SMALL} == set(NETWORKS)


def test_the_readme_shows_what_works() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", README.read_text(encoding="utf-8"), re.M))
    heads = re.findall(r"^\| transform \|(.*)\|$", README.read_text(encoding="utf-8"), re.M)
    networks = [name.strip(" `") for name in heads[-1].split("|")]
    assert sorted(networks) == sorted(SMALL)
    for transform in sorted(set(TRANSFORMS) - NOT_HERE):
        shown = [cell.strip() == "yes" for cell in rows[transform].split("|")]
        assert shown == [outcome(transform, network) is None for network in networks], transform
