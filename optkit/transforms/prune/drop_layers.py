"""Removes whole blocks: a shorter model that is faster everywhere and opens in plain transformers. What it loses in quality is measured."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import blocks

_NOT_BY_BLOCK = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}  # lists that count something else


class DropLayers(Transform):
    """Drop the blocks that change their input least (block influence: Men et al. 2024, arXiv 2403.03853), or those named."""

    stage: ClassVar[Stage] = Stage.PRUNE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    count: Annotated[int, Field(ge=1)] = Field(default=1, description="how many blocks to drop; ignored where layers are named")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="positions of the blocks to drop, counted from 0")

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed only to choose the blocks."""
        return not self.layers

    def check(self, plan: Plan) -> None:
        """Refuse to drop blocks that are not there, or all of them."""
        self._check_module(plan.subject.module)

    def preview(self, subject: Subject) -> Subject:
        """Drop the last blocks instead of the best: the shapes are the same."""
        depth = len(blocks(subject.module)[1])
        return type(self)(layers=self.layers or tuple(range(depth - self.count, depth))).apply(subject)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the shorter module; its configuration says so too."""
        self._check_module(module)
        doomed = set(self.layers)
        if not doomed:
            if data is None or not data.batches:
                raise TransformError("drop_layers needs calibration data to choose the blocks; name them instead: layers: [5, 6]")
            influence = block_influence(module, data)
            doomed = set(sorted(range(len(influence)), key=influence.__getitem__)[: self.count])
        return drop(module, doomed)

    def _check_module(self, module: nn.Module) -> None:
        name, stack = blocks(module)
        missing = [layer for layer in self.layers if layer >= len(stack)]
        if missing:
            raise TransformError(f"{name} has blocks 0 to {len(stack) - 1}, there is no {missing[0]}")
        doomed = len(set(self.layers)) or self.count
        if doomed >= len(stack):
            raise TransformError(
                f"cannot drop {doomed} of the {len(stack)} blocks of {name}; at least one must stay: count at most {len(stack) - 1}"
            )


@torch.no_grad()
def block_influence(module: nn.Module, data: Calibration) -> list[float]:
    """Return for each block 1 - cosine(input, output), averaged over all positions of the data."""
    _, stack = blocks(module)
    totals, positions = [0.0] * len(stack), 0
    states: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            states[index] = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)

        return hook

    handles = [block.register_forward_hook(watch(index), with_kwargs=True) for index, block in enumerate(stack)]
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


def drop(module: nn.Module, doomed: set[int]) -> nn.Module:
    """Remove the blocks at these positions, renumber the rest and shorten every list of the configuration that had one entry a block."""
    name, stack = blocks(module)
    depth = len(stack)
    kept = [index for index in range(depth) if index not in doomed]
    parent, _, attribute = name.rpartition(".")
    shorter = nn.ModuleList([stack[index] for index in kept])
    module.get_submodule(parent).register_module(attribute, shorter)
    for position, block in enumerate(shorter):
        for layer in block.modules():
            if isinstance(getattr(layer, "layer_idx", None), int):
                layer.layer_idx = position  # type: ignore[assignment]
    config = getattr(module, "config", None)
    if config is not None:
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == depth and key not in _NOT_BY_BLOCK:
                setattr(config, key, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
    return module
