"""Quantization-aware training: the weights learn to stand where rounding hurts less. It takes data and minutes; packing takes neither.

In a recipe ``qat`` is a short healing run on the calibration side of the task. int8 costs so little by itself that a short run can lose
more than it wins; int4 and pruned models are what it is for. In training code, ``prepare`` and ``convert`` stand around
any loop, of one's own, of accelerate, or of the Trainer of transformers:

    model = prepare(model, format="int4")   # before the optimizer is made
    ...                                     # train, save and load state dicts
    model = convert(model)                  # Int4Linear, Int8Linear, Int8Embedding
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.kernels.int8 import Int8Linear
from optkit.kernels.packed import PackedLayer
from optkit.transforms.contract import Plan, Stage
from optkit.transforms.distill.losses import Distillation
from optkit.transforms.layers import output_head, replace_layer, tied_embedding, weight_of
from optkit.transforms.quantize.fake import Fake, FakeInt4Linear, FakeInt8Embedding, FakeInt8Linear, FakeLinear, master
from optkit.transforms.quantize.int4 import Int4
from optkit.transforms.quantize.int8 import Int8
from optkit.transforms.quantize.packing import selected
from optkit.transforms.training.contract import TrainingTransform
from optkit.transforms.training.loop import heal

Format = Literal["int4", "int8"]


class Qat(TrainingTransform):
    """Train through the rounding for some hundred steps, then pack as ``int4`` or ``int8`` would; pruned weights stay pruned till then."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    format: Format = Field(default="int4", description="what the layers are packed into")
    group_size: Literal[32, 64, 128] = Field(default=64, description="int4: inputs that share a scale")
    head: Format = Field(default="int8", description="int4: format of the output head; one that is tied to the embedding is always int8")
    targets: Targets = Field(default=Targets(), description="linear layers to quantize; the others train along as they are")
    distill: bool = Field(default=True, description="learn the answers of the untouched model; else the next token of the text")

    def check(self, plan: Plan) -> None:
        """Refuse what ``int4`` or ``int8`` would refuse, and random weights."""
        if not plan.subject.trained:
            raise TransformError("qat heals a trained model, and the weights of this one are random; use int4 or int8 to measure its speed")
        self.refuse_idle_ranks()
        self._packing().check(plan)

    def preview(self, subject: Subject) -> Subject:
        """Return the packed shapes, without any training."""
        return replace(self._packing().preview(subject), history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module, trained and packed.

        The teacher is the model before its first transform where the data knows it, else the one given here. Everything trains in float32;
        what is not packed is given back in the dtype it had.
        """
        data = data or Calibration()
        if not data.batches:
            raise TransformError(
                "qat needs data to train on, and there is none; give the task a corpus with more text, pass Calibration(batches) to "
                "apply, or take int4 or int8, which need no data"
            )
        teacher = (data.untouched() if data.untouched else copy.deepcopy(module)) if self.distill else None
        dtypes = {name: tensor.dtype for name, tensor in _floats(module).items()}
        student = prepare(module, self.format, self.group_size, self.head, self.targets)
        computing = {layer: layer.compute_dtype for layer in student.modules() if isinstance(layer, Fake | PackedLayer)}
        student.float()
        loss = Distillation(teacher) if teacher is not None else Distillation(None, logits=0, next_token=1)
        heal(student, loss, data, self.course())
        for layer, dtype in computing.items():
            layer.compute_dtype = dtype
        packed = convert(student)
        for name, tensor in _floats(packed).items():
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
        return packed

    def _packing(self) -> Int4 | Int8:
        return packing(self.format, self.group_size, self.head, self.targets)


def packing(format: Format, group_size: Literal[32, 64, 128], head: Format, targets: Targets) -> Int4 | Int8:
    """Return the transform that packs without training."""
    return Int4(group_size=group_size, head=head, targets=targets) if format == "int4" else Int8(targets=targets)


def prepare(
    module: nn.Module,
    format: Format = "int4",
    group_size: Literal[32, 64, 128] = 64,
    head: Format = "int8",
    targets: Targets | None = None,
) -> nn.Module:
    """Return the module with layers that train as what they will be packed into; they are replaced in place.

    The layers are those that ``int4`` or ``int8`` would pack, with the same head and the same tied embedding. Their weights become
    float32 where they are not; call it before an optimizer is made. A state dict of the prepared model loads into one prepared alike.

    Raises:
        TransformError: what ``int4`` or ``int8`` would refuse; or the layers have shapes only.
        TargetError: a pattern matches nothing.
    """
    targets = targets or Targets()
    packing(format, group_size, head, targets).check(Plan(Subject(module, source=type(module).__name__)))
    if isinstance(module, nn.Linear):
        return _faked(module, group_size if format == "int4" else None)
    name_of_head = output_head(module)
    for name, layer in selected(module, targets, "qat").items():
        eight_bit = format == "int8" or (name == name_of_head and head == "int8")
        embedding = tied_embedding(module, layer)
        try:
            faked = _faked(layer, None if eight_bit or embedding is not None else group_size)
            if embedding is not None:
                replace_layer(module, embedding, _faked_embedding(module.get_submodule(embedding), faked.weight))
            replace_layer(module, name, faked)
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
    return module


def convert(module: nn.Module) -> nn.Module:
    """Return the module with packed layers in the place of those that ``prepare`` made; they are replaced in place.

    A head whose weight is that of the embedding shares the packed one. The answers stay the same but for the rounding of sums.

    Raises:
        TransformError: there are no such layers, or a weight holds NaN or infinity.
    """
    if isinstance(module, FakeLinear):
        return module.pack()
    faked = {name: layer for name, layer in module.named_modules() if isinstance(layer, FakeLinear | FakeInt8Embedding)}
    if not faked:
        raise TransformError(f"{type(module).__name__} has no layer to convert; call prepare on it first, and convert it once")
    owners = {layer.weight: (name, layer.pack()) for name, layer in faked.items() if isinstance(layer, FakeInt8Embedding)}
    for name, layer in faked.items():
        try:
            if isinstance(layer, FakeInt8Embedding):
                replace_layer(module, name, owners[layer.weight][1])
            elif layer.weight in owners:
                replace_layer(module, name, Int8Linear.tied_to(owners[layer.weight][1], layer.bias).train(layer.training))
            else:
                replace_layer(module, name, layer.pack())
        except TransformError as error:
            raise TransformError(f"{name}: {error}") from None
    return module


def _faked(layer: nn.Module, group_size: int | None) -> FakeLinear:
    """Return a layer that trains; in int8 where no group size is given. A weight that is shared stays shared."""
    own = layer._parameters.get("weight")
    weight = master(own if own is not None and own.shape == weight_of(layer).shape and isinstance(layer, nn.Linear) else weight_of(layer))
    dtype = weight_of(layer).dtype
    bias = layer._parameters.get("bias")
    faked = FakeInt8Linear(weight, bias, dtype) if group_size is None else FakeInt4Linear(weight, bias, dtype, group_size)
    return faked.train(layer.training)


def _faked_embedding(embedding: nn.Module, weight: Tensor) -> FakeInt8Embedding:
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(weight, nn.Parameter)
    if embedding.max_norm is not None:
        raise TransformError("an embedding with max_norm changes its rows as it reads them and cannot be packed; exclude this layer")
    return FakeInt8Embedding(weight, embedding.padding_idx, embedding.weight.dtype).train(embedding.training)


def _floats(module: nn.Module) -> dict[str, Tensor]:
    """Return what a change of dtype would change: the parameters, and the buffers outside packed layers."""
    kept = {f"{name}." if name else "" for name, layer in module.named_modules() if isinstance(layer, PackedLayer)}
    buffers = {
        name: tensor for name, tensor in module.named_buffers() if tensor.is_floating_point() and f"{name.rpartition('.')[0]}." not in kept
    }
    return {name: tensor for name, tensor in module.named_parameters() if tensor.is_floating_point()} | buffers
