"""Pipeline parallelism: every process has some blocks, the first the embedding too, the last the norm and the head.

A stage is the model itself with fewer blocks: it takes hidden states where there were embeddings, and gives them where there were logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.depth import DEPTHS, renumber, shorten
from optkit.core.errors import TransformError
from optkit.core.group import share_of
from optkit.engines.parallel.part import Part
from optkit.engines.parallel.shards import is_tied

_AT_THE_DOOR = (
    "word_embeddings_layernorm",
    "project_in",
    "emb_dropout",
    "drop",
)  # between embedding and blocks
_POSITIONS = ("wpe", "embed_positions")  # added to what comes in
_AT_THE_END = ("norm", "ln_f", "final_layer_norm", "project_out")
_ANYWHERE = ("rotary_emb", "rotary_emb_local")
_OVER_LOGITS = ("final_logit_softcapping",)


class _Nothing(nn.Module):
    """Stands for positions that an earlier stage has added."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return torch.zeros(1, 1, 1, dtype=torch.int8)  # a whole number leaves the dtype of what it is added to


def bounds_of(depth: int, stages: int, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first block of each stage, and the one after its last.

    Raises:
        TransformError: the counts do not fit, or there are fewer blocks than stages.
    """
    if depth < stages:
        raise TransformError(f"{depth} blocks cannot be shared by {stages} stages; use size {depth} at most")
    if counts and (len(counts) != stages or sum(counts) != depth or min(counts) < 1):
        raise TransformError(f"stages {list(counts)} are {len(counts)} with {sum(counts)} blocks; expected {stages} with {depth}")
    if counts:
        return list(pairwise([0, *accumulate(counts)]))
    shares = [share_of(depth, stages, index) for index in range(stages)]
    return [(share.start, share.stop) for share in shares]


def cut_to_stage(module: Any, part: Part) -> Callable[[str], str | None]:
    """Cut a model down to one stage; return the new name of each saved tensor, or None for those that other stages have.

    Raises:
        TransformError: there are fewer blocks than stages, or the model has parts whose place is not known.
    """
    name, listed = block_list(module)
    start, end = bounds_of(len(listed), part.mesh.pipeline, part.stages)[part.place.pipeline]
    before = _saved(module)
    holder, _, attribute = name.rpartition(".")
    _refuse_unknown(module.get_submodule(holder), holder, attribute)
    module.get_submodule(holder).register_module(attribute, nn.ModuleList([listed[index] for index in range(start, end)]))
    _renumber(module, name, len(listed), range(start, end))
    _take_ends(module, module.get_submodule(holder), part)
    blocks, after = re.compile(re.escape(name) + r"\.(\d+)\.(.*)"), _saved(module)

    def renamed(tensor: str) -> str | None:
        found = blocks.fullmatch(tensor)
        if found:
            index = int(found[1])
            return f"{name}.{index - start}.{found[2]}" if start <= index < end else None
        return tensor if tensor in after or tensor not in before else None

    return renamed


def block_list(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the blocks of a causal language model.

    Raises:
        TransformError: it has none that the configuration counts.
    """
    config = getattr(module, "config", None)
    depths = {getattr(config, key, None) for key in DEPTHS}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.ModuleList) and len(layer) in depths:
            return name, layer
    raise TransformError(f"{type(module).__name__} has no list of blocks that its configuration counts, so it cannot be cut into stages")


def _saved(module: nn.Module) -> set[str]:
    return set(module.state_dict(keep_vars=True))


def _refuse_unknown(inner: Any, name: str, blocks: str) -> None:
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    known = {blocks, *_AT_THE_DOOR, *_POSITIONS, *_AT_THE_END, *_ANYWHERE}
    for child, layer in inner.named_children():
        if child not in known and layer is not embedding and next(layer.parameters(), None) is not None:
            raise TransformError(f"{name}.{child} ({type(layer).__name__}) is neither block, embedding nor norm: no stage is known for it")


def _renumber(module: Any, name: str, depth: int, kept: range) -> None:
    """Number the blocks anew, for the cache, and shorten what the configuration lists or counts by block."""
    module.config = deepcopy(module.config)
    for layer in module.modules():
        if getattr(layer, "config", None) is not None and type(layer.config) is type(module.config):
            layer.config = module.config
    renumber(module.get_submodule(name))
    shorten(module.config, depth, kept, [key for key in DEPTHS if getattr(module.config, key, None) == depth])


def _take_ends(module: Any, inner: Any, part: Part) -> None:
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    names = {id(layer): name for name, layer in module.named_modules()}
    tied = is_tied(embedding, head)
    if not part.is_first:
        for child in (*_AT_THE_DOOR, *_POSITIONS):
            if getattr(inner, child, None) is not None:
                setattr(inner, child, _Nothing() if child in _POSITIONS else nn.Identity())
        if not (part.is_last and tied):
            _replace(module, names[id(embedding)])
    if not part.is_last:
        for child in _AT_THE_END:
            if getattr(inner, child, None) is not None:
                setattr(inner, child, nn.Identity())
        for key in _OVER_LOGITS:
            if getattr(module.config, key, None) is not None:
                setattr(module.config, key, None)
        if head is not None:
            _replace(module, names[id(head)])


def _replace(module: nn.Module, name: str) -> None:
    parent, _, attribute = name.rpartition(".")
    module.get_submodule(parent).register_module(attribute, nn.Identity())
