"""Bits where they matter: each layer's format by how far the answers move when that layer alone is rounded, under a budget.

The sum of the layers' errors stands for the error of all together; that is true while errors are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from optkit.core.errors import TargetError, TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets, matches
from optkit.kernels.int4 import Int4Linear, dequantize_groups, quantize_groups
from optkit.kernels.int8 import Int8Linear, dequantize_rows, quantize_rows
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import is_on_meta, tied_embedding, weight_of
from optkit.transforms.quantize.budget import Option, upgrades, within
from optkit.transforms.quantize.packing import pack_named, packer, selected
from optkit.transforms.quantize.sensitivity import Probe

Format = Literal["int4", "int8", "keep"]


class Mixed(Transform):
    """Linear layers packed in 4 or 8 bits or left alone, each as its measured sensitivity asks for."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    bits: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="budget: average stored bits a weight, scales included; a head tied to the embedding is int8 and not counted",
    )
    kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="budget: divergence from the model as it was, in nats a token, measured on calibration data"
    )
    formats: tuple[Format, ...] = Field(default=("int4", "int8"), min_length=1, description="formats to choose from; keep is none")
    group_size: Literal[32, 64, 128] = Field(default=64, description="inputs that share a scale in int4")
    layers: Mapping[str, Format] = Field(
        default={}, description="formats by pattern, the first that matches a layer; where given, nothing is measured"
    )
    targets: Targets = Field(default=Targets(), description="linear layers to quantize")

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        if not self.layers and (self.bits is None) == (self.kl is None):
            raise ValueError("give one budget: bits, the average bits a weight, or kl, the divergence allowed")
        return self

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed only to choose the formats."""
        return not self.layers

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing, groups that do not divide, and a budget of bits that no choice keeps."""
        self._check_module(plan.subject.module)

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Return this transform with the format of every layer filled in."""
        free = self._check_module(module)
        if self.layers:
            return self
        options = {name: self._options(name, layer) for name, layer in free.items()}
        if is_on_meta(module):
            return self._with({name: found[0] for name, found in options.items()})
        if data is None or not data.batches:
            raise TransformError("mixed needs calibration data to choose the formats; name them instead: layers: {'*': int8}")
        probe = Probe(module, data, runs=1 + sum(len(found) for found in options.values()))
        measured = {name: [self._measured(module, name, option, probe) for option in found] for name, found in options.items()}
        if self.bits is not None:
            weights = sum(weight_of(layer).numel() for layer in free.values())
            return self._with(within(measured, self.bits * weights))
        return self._with(self._within_divergence(module, measured, probe))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with packed layers."""
        step = self.decide(module, data)
        formats = step._formats(step._check_module(module))
        int4, int8 = packer(Int4Linear, group_size=self.group_size), packer(Int8Linear)
        if isinstance(module, nn.Linear):
            return module if formats[""] == "keep" else {"int4": int4, "int8": int8}[formats[""]](*_tensors(module))
        tied = [name for name in selected(module, self.targets, "mixed") if name not in formats]
        pack_named(module, [*tied, *(name for name, form in formats.items() if form == "int8")], int8, int8)
        return pack_named(module, [name for name, form in formats.items() if form == "int4"], int4, int4)

    def _check_module(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that have a choice; a bare linear layer has the empty name."""
        chosen = {"": module} if isinstance(module, nn.Linear) else selected(module, self.targets, "mixed")
        free = {name: layer for name, layer in chosen.items() if not name or tied_embedding(module, layer) is None}
        if self.layers:
            for name, form in self._formats(free).items():
                if form == "int4" and weight_of(free[name]).shape[1] % self.group_size:
                    raise TransformError(f"group_size {self.group_size} does not divide in_features of {name}; choose int8 for it")
            return free
        least = sum(self._options(name, layer)[0].bits for name, layer in free.items())
        weights = sum(weight_of(layer).numel() for layer in free.values())
        if self.bits is not None and least > self.bits * weights * (1 + 1e-9):
            raise TransformError(
                f"a budget of {self.bits:g} bits a weight is less than the {least / weights:.3f} that the smallest formats take; "
                "allow that much, or add int4 or larger groups"
            )
        return free

    def _options(self, name: str, layer: nn.Module) -> list[Option]:
        """Return the formats that a layer can have, the smallest first, without their errors."""
        weight = weight_of(layer)
        rows, columns = weight.shape
        bits = {"int4": 4 + 32 / self.group_size, "int8": 8 + 32 / columns, "keep": 8 * weight.element_size()}
        fitting = [form for form in self.formats if form != "int4" or columns % self.group_size == 0]
        if not fitting:
            raise TransformError(f"group_size {self.group_size} does not divide in_features {columns} of {name}; add int8 to formats")
        return sorted((Option(form, bits[form] * rows * columns, 0.0) for form in fitting), key=lambda option: option.bits)

    def _formats(self, free: Mapping[str, nn.Module]) -> dict[str, Format]:
        """Return the format of every layer by the patterns of ``layers``."""
        for pattern in self.layers:
            if not any(matches(pattern, name) for name in free):
                raise TargetError(f"layers: pattern {pattern!r} matches none of the {len(free)} layers ({', '.join(list(free)[:3])}, ...)")
        found = {name: next((form for pattern, form in self.layers.items() if matches(pattern, name)), None) for name in free}
        without = [name for name, form in found.items() if form is None]
        if without:
            raise TransformError(
                f"layers: no pattern matches {without[0]} ({len(without)} of {len(free)} layers); add '*': keep at the end"
            )
        return {name: form for name, form in found.items() if form is not None}

    def _with(self, choice: Mapping[str, Option]) -> Self:
        return self.model_copy(update={"layers": {name: option.name for name, option in choice.items()}})

    def _measured(self, module: nn.Module, name: str, option: Option, probe: Probe) -> Option:
        if option.name == "keep":
            return option
        with _Rounded(module, self.group_size) as rounded:
            rounded.set(name, option.name)
            return option._replace(error=probe.distance())

    def _within_divergence(self, module: nn.Module, measured: Mapping[str, list[Option]], probe: Probe) -> Mapping[str, Option]:
        """Return the choice of the fewest upgrades whose measured divergence, all layers together, keeps the budget."""
        assert self.kl is not None
        start, steps = upgrades(measured)

        def after(count: int) -> tuple[dict[str, Option], float]:
            choice = start | dict(steps[:count])
            with _Rounded(module, self.group_size) as rounded:
                for name, option in choice.items():
                    rounded.set(name, option.name)
                return choice, probe.distance()

        low, high = 0, len(steps)
        best, reached = after(high)
        if reached > self.kl:
            raise TransformError(
                f"kl {self.kl:g} cannot be kept: the best formats give {reached:.2g}; allow that much, or add keep to formats"
            )
        while low < high:
            middle = (low + high) // 2
            choice, divergence = after(middle)
            if divergence <= self.kl:
                best, high = choice, middle
            else:
                low = middle + 1
        return best


class _Rounded:
    """Holds rounded weights in a module's layers, and puts the true ones back at the end."""

    def __init__(self, module: nn.Module, group_size: int) -> None:
        self._module = module
        self._group_size = group_size
        self._kept: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    @torch.no_grad()
    def set(self, name: str, form: str) -> None:
        """Round the weight of one layer as a format would."""
        if form == "keep":
            return
        weight = weight_of(self._module.get_submodule(name))
        self._kept[name] = weight.clone()
        try:
            rounded = (
                dequantize_rows(*quantize_rows(weight)) if form == "int8" else dequantize_groups(*quantize_groups(weight, self._group_size))
            )
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
        weight.copy_(rounded)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, weight in self._kept.items():
            weight_of(self._module.get_submodule(name)).copy_(weight)


def _tensors(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
