"""A model without its weights, made from what an artefact says of it: configuration and class, of each member where it has several."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optkit.core.errors import ModelError
from optkit.models.architectures import build, is_public, named_class
from optkit.models.huggingface import read_config
from optkit.models.networks import rebuilt


def is_pretrained(module: nn.Module) -> bool:
    """Say whether the module is a transformers model, with a configuration it can be built from."""
    if "transformers.modeling_utils" not in sys.modules:
        return False  # nobody can have made one yet, and a plain module need not wait for the import
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def describe(module: nn.Module, folder: Path) -> None:
    """Write the configurations from which the module can be made: its own, or one for each member."""
    for number, member in enumerate(_members(module)):
        place = folder / f"member-{number}"
        place.mkdir()
        describe(member, place)
    if is_pretrained(module):
        module.config.save_pretrained(folder)  # type: ignore[operator,union-attr]
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)


def members_of(module: nn.Module) -> list[str]:
    """Return the classes of the models that stand side by side; none for any other module."""
    return [type(member).__name__ for member in _members(module)]


def as_described(module: nn.Module, network: Mapping[str, Any] | None = None) -> nn.Module | None:
    """Return the model on the meta device as its configuration or its network describes it; None where only its class can make it."""
    if network is not None:
        with torch.device("meta"):
            return rebuilt(network)
    members = [as_described(member) for member in _members(module)]
    if members and all(members):
        return _together([member for member in members if member is not None], type(module).__name__)
    if not is_public(module):
        return None
    with torch.device("meta"):
        return build(type(module), module.config)


def skeleton(folder: Path, structure: dict[str, Any], into: nn.Module | None) -> nn.Module:
    """Return the module with weights still to be read; ``into`` stands in where only its class can make it.

    Raises:
        ModelError: it cannot be made, and there is no ``into``.
    """
    if structure.get("network"):
        try:
            return _shortened(rebuilt(structure["network"]), structure.get("lists", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder} does not say how its network is made: {error}") from None
    if into is not None:
        return _shortened(into, structure.get("lists", {}))
    if structure.get("members"):
        names = enumerate(structure["members"])
        parts = [skeleton(folder / f"member-{number}", {"class": name, "pretrained": True}, None) for number, name in names]
        return _together(parts, structure["class"])
    config = read_config(folder) if structure["pretrained"] else None
    if config is not None:
        config.__dict__.pop("quantization_config", None)  # it speaks to other loaders; here optkit.json tells of the layers
    kind = named_class(structure["class"], config)
    if kind is None:
        raise ModelError(
            f"{folder} holds the weights of a {structure['class']}; give a fresh one: load(folder, into={structure['class']}(...))"
        )
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    with no_init_weights():
        module = build(kind, config)
    if (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module


def tie_dense(module: nn.Module) -> None:
    """Tie the weights that the configuration says are one, unless packed layers share theirs."""
    for model in _members(module) or [module]:
        if is_pretrained(model) and all(getattr(layer, "tied", None) is None for layer in model.modules()):
            model.tie_weights()  # type: ignore[operator]


def _members(module: nn.Module) -> list[nn.Module]:
    if "optkit.engines.ensemble" not in sys.modules:
        return []
    from optkit.engines.ensemble import Members

    return list(module.members) if isinstance(module, Members) else []


def _together(members: list[nn.Module], kind: str) -> nn.Module:
    from optkit.engines.ensemble import Members
    from optkit.engines.variants import Variants

    return (Variants if kind == Variants.__name__ else Members)(members)


def _shortened(module: nn.Module, lengths: dict[str, int]) -> nn.Module:
    """Cut lists of blocks to the length that was saved: a fresh module still has the blocks that were dropped."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.ModuleList) and len(layer) > lengths.get(name, len(layer)):
            del layer[lengths[name] :]
    return module
