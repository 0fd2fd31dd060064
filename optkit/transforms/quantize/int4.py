"""Weight-only int4 in groups of inputs. Rounding to nearest and hqq need no data; awq and gptq look at some and round better by it."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.kernels.int4 import GROUP_SIZES, GROUP_STEP, Int4Linear, quantize_groups
from optkit.kernels.int8 import Int8Linear
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.layers import hidden_weights, is_on_meta, output_head, tied_embedding, weight_of
from optkit.transforms.quantize.calibrated import Format, pack_calibrated
from optkit.transforms.quantize.embedding import pack_embedding, refuse_embedding
from optkit.transforms.quantize.hqq import quantize_hqq
from optkit.transforms.quantize.packing import candidates, pack_layers, pack_named, packer, selected

CALIBRATED = ("awq", "gptq")


class Int4(Transform):
    """Linear layers packed in 4 bits and run packed; a scale and a zero point for each group of inputs."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    method: Literal["rtn", "hqq", "awq", "gptq"] = Field(
        default="rtn", description="how numbers are chosen: rounded to nearest, half-quadratic, activation-aware, or with error feedback"
    )
    group_size: Literal[32, 64, 128, "channel"] = Field(default=64, description="inputs that share a scale; 'channel': a whole row")
    symmetric: bool = Field(default=False, description="whether the zero point is 8 in all groups; saves no bytes")
    act_order: bool = Field(default=True, description="gptq: columns with the largest inputs first")
    head: Literal["int8", "int4"] = Field(
        default="int8", description="format of the output head; one that is tied to the embedding is always int8"
    )
    embedding: bool = Field(default=False, description="pack an input embedding that is not tied to the head, in int8")
    targets: Targets = Field(default=Targets(), description="linear layers to quantize")

    @model_validator(mode="after")
    def _point_is_free(self) -> Self:
        if self.method == "hqq" and self.symmetric:
            raise ValueError("hqq chooses the zero point, and symmetric fixes it; use method rtn, awq or gptq, or leave out symmetric")
        return self

    @property
    def needs_data(self) -> bool:
        """Awq and gptq look at calibration data."""
        return self.method in CALIBRATED

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing and groups that do not divide; all such layers are counted, the first is named."""
        self._check_module(plan.subject.module)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module with packed layers; on the meta device, with their shapes.

        Raises:
            TransformError: the method looks at data, and there is none.
        """
        four_bit = self._check_module(module)
        if self.method in CALIBRATED and not is_on_meta(module):
            if data is None or not data.batches:
                raise TransformError(f"int4 by {self.method} needs calibration data; give some, or use method rtn or hqq, which need none")
            packed = self._calibrate(module, four_bit, data)
        else:
            packed = pack_layers(module, self.targets, self._pack, self._pack if self.head == "int4" else packer(Int8Linear))
        return pack_embedding(packed) if self.embedding else packed

    def _calibrate(self, module: nn.Module, four_bit: list[str], data: Calibration) -> nn.Module:
        assert self.method == "awq" or self.method == "gptq"
        alone = isinstance(module, nn.Linear)
        whole = nn.Sequential(module) if alone else module
        names = ["0"] if alone else self.targets.select(candidates(module), hidden_weights(module))
        pack_calibrated(whole, ["0"] if alone else four_bit, data, self.method, self._format(), self.act_order)
        rest = [name for name in names if name not in four_bit]
        return whole.get_submodule("0") if alone else pack_named(module, rest, self._pack, packer(Int8Linear))

    def _format(self) -> Format:
        return Format(None if self.group_size == "channel" else self.group_size, self.symmetric)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        size = self._format().size(weight)
        if weight.is_meta:
            return packer(Int4Linear, group_size=size)(weight, bias)
        find = quantize_hqq if self.method == "hqq" else partial(quantize_groups, symmetric=self.symmetric)
        return Int4Linear(find(weight, size), bias, size, weight.dtype)

    def _check_module(self, module: nn.Module) -> list[str]:
        """Return the names of the layers that get 4 bits."""
        if isinstance(module, nn.Linear):
            layers: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            layers = selected(module, self.targets, "int4")
        if self.embedding:
            refuse_embedding(module, self.targets, "int4")
        head = output_head(module)
        eight_bit = {name for name in layers if (name == head and self.head == "int8") or tied_embedding(module, layers[name])}
        widths = {name: weight_of(layer).shape[1] for name, layer in layers.items() if name not in eight_bit}
        step = GROUP_STEP if self.group_size == "channel" else self.group_size
        odd = {name: width for name, width in widths.items() if width % step}
        if odd:
            name, width = next(iter(odd.items()))
            fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths.values())]
            advice = (
                f"use group_size {' or '.join(map(str, fitting))}" if fitting else f"exclude such layers: targets: {{exclude: ['{name}']}}"
            )
            what = (
                f"a group of a channel needs a multiple of {step}, and"
                if self.group_size == "channel"
                else f"group_size {step} does not divide"
            )
            raise TransformError(f"{what} in_features {width} of {name} ({len(odd)} of {len(layers)} layers); {advice}")
        return list(widths)
