"""Cuts a model whose weights are still to be read down to one process's part, and gives that part of every saved tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optkit.engines.parallel.part import Part
from optkit.engines.parallel.shards import cut_to_shard
from optkit.engines.parallel.slices import Slice
from optkit.engines.parallel.stages import cut_to_stage


@dataclass(frozen=True)
class Cut:
    """What becomes of the saved tensors of the whole model."""

    renamed: Callable[[str], str | None] = field(default=lambda name: name)
    slices: Mapping[str, Slice] = field(default_factory=dict)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of this process's part of a tensor, by its new name."""
        return self.slices[name].of(tensor) if name in self.slices else tensor.clone()


def cut(module: nn.Module, part: Part) -> Cut:
    """Cut a model down to one part, in shape alone; what it holds afterwards is still to be read.

    Raises:
        TransformError: it cannot be shared so.
    """
    renamed = cut_to_stage(module, part) if part.mesh.pipeline > 1 else lambda name: name
    slices = cut_to_shard(module, part) if part.mesh.tensor > 1 else {}
    return Cut(renamed, slices)


def part_of(module: nn.Module, part: Part) -> nn.Module:
    """Return one part of a model in memory, with weights of its own; the model itself stays as it is.

    Raises:
        TransformError: it cannot be shared so.
    """
    shell = hollow(module)
    found, twins = cut(shell, part), twins_of(module)
    state = {}
    for name, tensor in module.state_dict().items():
        new = found.renamed(name)
        if new is not None and name not in twins and isinstance(tensor, Tensor):
            state[new] = found.of(new, tensor)
    fill(shell, state)
    return shell.eval()


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of a module's own; parameters that were one stay one."""
    twins = twins_of(module)
    module.load_state_dict(tensors, strict=False, assign=True)
    for twin, name in twins.items():  # assigning has put a new tensor in the place of one of them alone
        parent, _, attribute = twin.rpartition(".")
        module.get_submodule(parent).register_parameter(attribute, module.get_parameter(name))


def twins_of(module: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that stand in several places, with their first names."""
    first: dict[int, str] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    return {name: first[id(parameter)] for name, parameter in named if first.setdefault(id(parameter), name) != name}


def hollow(module: nn.Module) -> nn.Module:
    """Return a copy whose saved tensors are on the meta device; those that are not saved are copied."""
    saved = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    empty: dict[int, object] = {}
    for tensor in saved.values():
        bare = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(module, empty)
