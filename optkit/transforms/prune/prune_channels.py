"""Removes channels and units from networks of any kind, by torch-pruning's dependency graph: smaller dense layers, faster everywhere.

For models of transformers there are ``prune_ffn``, ``prune_heads`` and ``prune_hidden``, which follow the configuration instead of a trace.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from optkit.core.errors import OptkitWarning, TransformError
from optkit.core.subject import Calibration, Subject
from optkit.core.targets import Targets
from optkit.transforms.contract import Plan, Stage, Transform
from optkit.transforms.prune.lstm_units import begun_by, is_simple, lstm_pruner
from optkit.transforms.tracing import answer_of, evaluating

_KINDS = (nn.Linear, nn.LSTM, nn.modules.conv._ConvNd)


class PruneChannels(Transform):
    """Fewer outputs for convolutions, linear layers and LSTMs, by the norm of all that goes with one (Fang et al. 2023, arXiv 2301.12900).

    LSTMs of several layers keep theirs, with a warning; those of two directions lose as many in each, and one that begins with the state
    of another loses the same units as that.
    What depends on a channel goes with it: rows, columns, biases, statistics. The answers of the network keep their shape.
    """

    stage: ClassVar[Stage] = Stage.PRUNE
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "optkit"
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.25, description="share of the channels of each layer that is removed")
    multiple: Annotated[int, Field(ge=1, le=4096)] = Field(default=8, description="the number of channels left is a multiple of this")
    targets: Targets = Field(default=Targets(), description="layers whose outputs are pruned")

    @property
    def needs_data(self) -> bool:
        """One batch is needed, to follow it through the network."""
        return True

    @property
    def data_items(self) -> int:
        """One will do."""
        return 1

    def check(self, plan: Plan) -> None:
        """Refuse patterns that match nothing, and models of transformers."""
        self._layers(plan.subject.module)

    def preview(self, subject: Subject) -> Subject:
        """Return the network as it is: how its layers depend on one another is only known once data has gone through it."""
        return replace(subject, history=(*subject.history, self.step()))

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the network with fewer channels.

        Raises:
            TransformError: there is no data; nothing could be removed; or the answers have lost their shape.
        """
        chosen = self._layers(module)
        if data is None or not data.batches:
            raise TransformError("prune_channels needs a batch of data to follow through the network; pass Calibration(batches) to apply")
        inputs = {name: tensor[:1] for name, tensor in data.batches[0].items()}
        with evaluating(module):
            before = answer_of(module, inputs).shape
            ends = _ends(module, inputs)
            keep: list[nn.Module] = [
                layer for layer in module.modules() if isinstance(layer, _KINDS) and (layer not in chosen.values() or layer in ends)
            ]
            keep += _left_alone(chosen)
            together = begun_by(module, inputs)
            keep += [layer for layers in together.values() for layer in layers]
            sizes = [parameter.numel() for parameter in module.parameters()]
            self._prune(module, inputs, keep, together)
            try:
                after = answer_of(module, inputs).shape
            except RuntimeError as error:
                raise TransformError(
                    f"{type(module).__name__} does not run without the channels; exclude the layer at fault: {error}"
                ) from None
        if before != after:
            raise TransformError(
                f"the answers were {tuple(before)} and would be {tuple(after)}: exclude the layer that makes them, by targets"
            )
        if sum(sizes) == sum(parameter.numel() for parameter in module.parameters()):
            raise TransformError(
                f"ratio {self.ratio} removes nothing from {type(module).__name__} at multiples of {self.multiple}; use a larger ratio, "
                "or a smaller multiple"
            )
        return module

    def _prune(self, module: nn.Module, inputs: dict[str, Tensor], keep: list[nn.Module], together: dict[nn.Module, list[nn.LSTM]]) -> None:
        import torch_pruning

        asked = {parameter: parameter.requires_grad for parameter in module.parameters()}
        module.requires_grad_(True)  # its graph is that of autograd
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.BasePruner(
                module,
                inputs,
                importance=torch_pruning.importance.GroupMagnitudeImportance(),
                pruning_ratio=self.ratio,
                ignored_layers=keep,
                round_to=self.multiple,
                customized_pruners={nn.LSTM: lstm_pruner(together)},
                output_transform=_tensors,
            )
            pruner.step()
        left = {id(parameter): wanted for parameter, wanted in asked.items()}
        for parameter in module.parameters():
            parameter.requires_grad_(left.get(id(parameter), True))

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        if type(module).__module__.startswith("transformers."):
            raise TransformError(f"{type(module).__name__} is a model of transformers; use prune_ffn, prune_heads or prune_hidden")
        able = {name: layer for name, layer in module.named_modules() if isinstance(layer, _KINDS) and name}
        if not able:
            raise TransformError(f"{type(module).__name__} has no convolution, linear layer or LSTM within it whose channels could go")
        return {name: able[name] for name in self.targets.select(able)}


def _left_alone(layers: dict[str, nn.Module]) -> list[nn.Module]:
    found = {name: layer for name, layer in layers.items() if isinstance(layer, nn.LSTM) and not is_simple(layer)}
    if found:
        warnings.warn(
            f"prune_channels: {', '.join(found)} has several layers or a projection and keeps its units", OptkitWarning, stacklevel=3
        )
    return list(found.values())


@torch.no_grad()
def _ends(module: nn.Module, inputs: dict[str, Tensor]) -> list[nn.Module]:
    """Return the layers whose outputs are the answers, or views of them."""
    made: dict[int, nn.Module] = {}
    kept: list[Any] = []

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                kept.append(tensor)  # so that no address is given twice
                made[tensor.data_ptr()] = layer

    handles = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, _KINDS)]
    try:
        output = module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [made[tensor.data_ptr()] for tensor in _tensors(output) if tensor.data_ptr() in made]


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    return [tensor for tensor in values if isinstance(tensor, Tensor)]
