"""One door to every model: ``reference``, ``shape:NAME``, a folder, or a name on the Hub. Opening by outline reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optkit.core.errors import ModelError
from optkit.core.registry import did_you_mean
from optkit.core.subject import Subject
from optkit.models import artefact, huggingface
from optkit.models.architectures import is_public
from optkit.models.networks import Network, described
from optkit.models.shapes import SHAPES, Shape, config_of

REFERENCE = Path(__file__).parent / "reference" / "weights"
SOURCES = {
    "reference": "the bundled 14-million-parameter Llama of Python code",
    "shape:NAME": f"random weights of a named size, for speed and memory only: {', '.join(SHAPES)}",
    "{shape: {...}}": "the same with the numbers given",
    "FOLDER": "a model in Hugging Face format, or an artefact that optkit saved",
    "OWNER/NAME": "a model on the Hugging Face Hub, where it can be reached",
}


def reference_tokenizer() -> Any:
    """Return the tokenizer of the bundled model, which the networks that are trained here use too."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REFERENCE, local_files_only=True)


def fresh(network: Network, needs: Mapping[str, Any], seed: int = 0) -> Subject:
    """Return a network that is still to be trained.

    Raises:
        ModelError: it is for other tasks.
    """
    torch.manual_seed(seed)
    module = network.build(needs).eval()
    made = described(network, needs)
    own = None if is_public(module) else made
    tokenizer = reference_tokenizer() if "vocabulary" in needs else None
    return Subject(module=module, source=made["name"], kind=network.kind, tokenizer=tokenizer, network=own)


def open_model(spec: str | Shape, trust_remote_code: bool = False, seed: int = 0) -> Subject:
    """Open a model with its weights.

    Raises:
        ModelError: nothing is there, a file is missing or damaged, transformers has no class for the architecture.
    """
    shape = _shape(spec)
    if shape is not None:
        torch.manual_seed(seed)
        return Subject(module=_build(config_of(shape)), source=_label(spec), trained=False)
    folder = local_folder(str(spec))
    if folder is not None and (folder / artefact.MANIFEST).exists():
        return artefact.load(folder, whole=True)
    return huggingface.open_pretrained(folder or str(spec), _label(spec), trust_remote_code)


def outline_model(spec: str | Shape, trust_remote_code: bool = False) -> Subject:
    """Open a model's shapes on the meta device; no weight is read."""
    shape = _shape(spec)
    if shape is not None:
        with torch.device("meta"):
            return Subject(module=_build(config_of(shape)), source=_label(spec), trained=False)
    folder = local_folder(str(spec))
    if folder is not None and (folder / artefact.MANIFEST).exists():
        return artefact.outline(folder)
    return huggingface.outline(folder or str(spec), _label(spec), trust_remote_code)


def local_folder(spec: str) -> Path | None:
    """Return the folder that a spec means, or None for a Hub name.

    Raises:
        ModelError: the spec looks like a folder, and there is none.
    """
    if spec == "reference":
        return REFERENCE
    try:
        folder = Path(spec).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelError(f"model {spec!r} is a file; give the folder that holds config.json and the weights")
    except (OSError, ValueError, RuntimeError) as error:  # a name too long or not allowed, an unknown '~user'
        raise ModelError(f"model {spec!r} is no name of a folder: {error}") from None
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(f"model folder {spec!r} does not exist; known sources: {', '.join(SOURCES)}")
    return None


def _shape(spec: str | Shape) -> Shape | None:
    if isinstance(spec, Shape):
        return spec
    if not spec.startswith("shape:"):
        return None
    name = spec.removeprefix("shape:")
    if name not in SHAPES:
        raise ModelError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def _label(spec: str | Shape) -> str:
    if isinstance(spec, Shape):
        return f"shape:{spec.family}-{spec.layers}x{spec.hidden_size}"
    return spec if "/" not in spec or local_folder(spec) is None else Path(spec).name


def _build(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    module: nn.Module = AutoModelForCausalLM.from_config(config)
    return module.eval()
