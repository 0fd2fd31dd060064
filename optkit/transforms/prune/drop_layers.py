"""Removes whole blocks: a shorter model that is faster everywhere and opens in plain transformers. What it loses in quality is measured."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.depth import DEPTHS, renumber, shorten
from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.distill.losses import next_token_loss
from optkit.transforms.layers import blocks
from optkit.transforms.tracing import evaluating


class DropLayers(Transform):
    """Drop the blocks that change their input least (block influence: Men et al. 2024, arXiv 2403.03853), or those named.

    By the loss, they are taken one after another, each time the block without which the next token is predicted best (as in SLEB: Song
    et al. 2024, arXiv 2402.09025).
    """

    stage: ClassVar[Stage] = Stage.PRUNE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    count: Annotated[int, Field(ge=1)] = Field(default=1, description="how many blocks to drop; ignored where layers are named")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="positions of the blocks to drop, counted from 0")
    importance: Literal["influence", "loss"] = Field(
        default="influence", description="what a block is judged by: how much it changes its input, or the loss without it"
    )
    stack: str | None = Field(default=None, description="list of blocks to shorten, such as encoder.block, where a model has several")

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed only to choose the blocks."""
        return not self.layers

    def check(self, plan: Plan) -> None:
        """Refuse to drop blocks that are not there, or all of them."""
        self._check_module(plan.subject.module)

    def preview(self, subject: Subject) -> Subject:
        """Drop the last blocks instead of the best: the shapes are the same."""
        depth = len(blocks(subject.module, self.stack)[1])
        last = tuple(range(depth - self.count, depth))
        shorter = drop(subject.module, set(self.layers or last), self.stack)
        return replace(subject, module=shorter, history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the shorter module; its configuration says so too."""
        self._check_module(module)
        doomed = set(self.layers)
        if not doomed:
            if data is None or not data.batches:
                raise TransformError("drop_layers needs calibration data to choose the blocks; name them instead: layers: [5, 6]")
            doomed = self._by_loss(module, data) if self.importance == "loss" else self._by_influence(module, data)
        return drop(module, doomed, self.stack)

    def _by_influence(self, module: nn.Module, data: Calibration) -> set[int]:
        influence = block_influence(module, data, self.stack)
        able = (index for index in sorted(range(len(influence)), key=influence.__getitem__) if _depth_key(module, {index}, self.stack))
        return set(islice(able, self.count))

    @torch.no_grad()
    def _by_loss(self, module: nn.Module, data: Calibration) -> set[int]:
        name, listed = blocks(module, self.stack)
        parent, _, attribute = name.rpartition(".")
        holder, doomed = module.get_submodule(parent), set[int]()

        def loss_without(index: int) -> float:
            holder.register_module(attribute, nn.ModuleList([block for i, block in enumerate(listed) if i not in doomed | {index}]))
            return sum(float(next_token_loss(module, module(**batch, use_cache=False), batch)) for batch in data.batches)

        try:
            with evaluating(module):
                while len(doomed) < self.count:
                    able = [i for i in range(len(listed)) if i not in doomed and _depth_key(module, doomed | {i}, self.stack)]
                    doomed.add(min(able, key=loss_without))
                    holder.register_module(attribute, listed)
        finally:
            holder.register_module(attribute, listed)
        return doomed

    def _check_module(self, module: nn.Module) -> None:
        name, stack = blocks(module, self.stack)
        missing = [layer for layer in self.layers if layer >= len(stack)]
        if missing:
            raise TransformError(f"{name} has blocks 0 to {len(stack) - 1}, there is no {missing[0]}")
        doomed = len(set(self.layers)) or self.count
        if doomed >= len(stack):
            raise TransformError(
                f"cannot drop {doomed} of the {len(stack)} blocks of {name}; at least one must stay: count at most {len(stack) - 1}"
            )
        _depth_key(module, set(self.layers), self.stack)


@torch.no_grad()
def block_influence(module: nn.Module, data: Calibration, stack: str | None = None) -> list[float]:
    """Return for each block 1 - cosine(input, output), averaged over all positions of the data."""
    listed = blocks(module, stack)[1]
    totals, positions = [0.0] * len(listed), 0
    states: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            states[index] = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)

        return hook

    handles = [block.register_forward_hook(watch(index), with_kwargs=True) for index, block in enumerate(listed)]
    try:
        for batch in data.batches:
            module(**batch)
            positions += next(iter(states.values())).numel()
            for index, distance in states.items():
                totals[index] += float(distance.sum())
    finally:
        for handle in handles:
            handle.remove()
    return [total / positions for total in totals]


def drop(module: nn.Module, doomed: set[int], stack: str | None = None) -> nn.Module:
    """Remove the blocks at these positions, renumber the rest and shorten every list of the configuration that had one entry a block.

    Raises:
        TransformError: the blocks are not alike, and no configuration describes the model without these.
    """
    name, listed = blocks(module, stack)
    depth = len(listed)
    key = _depth_key(module, doomed, stack)
    kept = [index for index in range(depth) if index not in doomed]
    parent, _, attribute = name.rpartition(".")
    shorter = nn.ModuleList([listed[index] for index in kept])
    module.get_submodule(parent).register_module(attribute, shorter)
    renumber(shorter)
    config = getattr(module, "config", None)
    if config is not None:
        shorten(config, depth, kept, [key])
    return module


def _depth_key(module: nn.Module, doomed: set[int], stack: str | None) -> str:
    """Return the number of the configuration that counts the blocks; for a model of transformers it is tried, on shapes alone.

    Raises:
        TransformError: whatever is counted less, transformers would build another model than this one without its ``doomed`` blocks.
    """
    name, listed = blocks(module, stack)
    config, depth = getattr(module, "config", None), len(listed)
    if config is None or not doomed or not type(module).__module__.startswith("transformers."):
        return DEPTHS[0]
    kept = [index for index in range(depth) if index not in doomed]
    position = {str(index): str(new) for new, index in enumerate(kept)}
    wanted = set()
    for part in _names(module):
        index, _, rest = part.removeprefix(f"{name}.").partition(".")
        inside = part.startswith(f"{name}.")
        if not inside or index in position:
            wanted.add(f"{name}.{position[index]}.{rest}".rstrip(".") if inside else part)
    for key in DEPTHS:
        if getattr(config, key, None) == depth:
            trial = deepcopy(config)
            shorten(trial, depth, kept, [key])
            with torch.device("meta"):
                twin = type(module)._from_config(trial)  # type: ignore[attr-defined]
            if _names(twin) == wanted:
                return key
    raise TransformError(
        f"the blocks of {name} are not alike: without {sorted(doomed)} it is no model that transformers can build; "
        f"name others to drop: layers: [{max(set(range(depth)) - doomed)}]"
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_modules(remove_duplicate=False)}
