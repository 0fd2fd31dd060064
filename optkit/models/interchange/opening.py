"""Opens a folder whose config.json has a ``quantization_config``: each layer by the file of its format, the rest as it is stored."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optkit.core.errors import ModelError, OptkitError
from optkit.core.subject import Step
from optkit.models.architectures import build, class_of
from optkit.models.interchange.grid import Place

FORMATS = {
    "bitsandbytes": "optkit.models.interchange.bits",
    "gptq": "optkit.models.interchange.gptq",
    "awq": "optkit.models.interchange.awq",
    "compressed-tensors": "optkit.models.interchange.compressed",
    "torchao": "optkit.models.interchange.ao",
}
_MATRICES = (".weight", ".qweight", ".weight_packed")  # an outline reads no numbers of these


def method_of(config: Any) -> str | None:
    """Return the name of the format that a configuration declares, None where the model is not quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # as transformers wrote it before it wrote names
    return str(method)


def open_quantized(place: Path | str, config: Any, only_shapes: bool = False) -> tuple[nn.Module, Step]:
    """Return the model with packed layers, and the step that tells how each was read.

    Args:
        place: the folder.
        config: its configuration.
        only_shapes: leave everything on the meta device. Scales and zero points are read all the same: they decide which layer fits.

    Raises:
        ModelError: the format is unknown, or something is missing, damaged, or of another shape than the configuration says.
    """
    method = method_of(config)
    if method not in FORMATS:
        raise ModelError(
            f"model {str(place)!r} is quantized already, by {method!r} (quantization_config in config.json), which is not read here; "
            f"known: {', '.join(FORMATS)}; or give the unquantized model"
        )
    if not isinstance(place, Path):
        raise ModelError(f"model {place!r} is quantized already, by {method!r}; download it and give the folder")
    declared = config.__dict__.pop("quantization_config")  # or transformers would look for the tool
    module = _skeleton(config, place, only_shapes)
    try:
        return _read(module, place, method, _settings(method, declared), only_shapes)
    except OptkitError as error:
        raise ModelError(f"model {str(place)!r} cannot be read as {method}: {error}") from None


def _skeleton(config: Any, place: Path, only_shapes: bool) -> nn.Module:
    from transformers.initialization import no_init_weights

    kind = class_of(config, str(place))
    try:
        with torch.device("meta" if only_shapes else "cpu"), no_init_weights():
            whole = hasattr(kind, "from_config")  # a door of transformers, where the file names no class
            module: nn.Module = kind.from_config(config, trust_remote_code=False) if whole else build(kind, config)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"model {str(place)!r} is none that transformers can build: {error}") from None
    return module


def _settings(method: str, declared: Any) -> Any:
    kind = import_module(FORMATS[method])
    try:
        settings = kind.Settings.model_validate(declared)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_url=False)[:3])
        raise ModelError(f"quantization_config: {told}") from None
    settings.refuse()
    return settings


def _read(module: nn.Module, place: Path, method: str, settings: Any, only_shapes: bool) -> tuple[nn.Module, Step]:
    tensors = _tensors(place, only_shapes)
    key = import_module(FORMATS[method]).KEY
    dtype = _dtype(module, tensors)
    counts: Counter[str] = Counter()
    done: list[str] = []
    notes: dict[str, list[str]] = {}
    for name, layer in _linear_layers(module).items():
        if f"{name}.{key}" not in tensors:
            continue
        parts = {full.removeprefix(f"{name}."): tensors[full] for full in tensors if full.startswith(f"{name}.")}
        for part in parts:
            del tensors[f"{name}.{part}"]
        columns, rows = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape  # type: ignore[misc]
        found = settings.read(parts, Place(name, int(columns), int(rows), dtype))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if found is None:
            continue
        _refuse_bias(layer, found.layer, name)
        counts[type(found.layer).__name__] += 1
        if found.note:
            notes.setdefault(found.note, []).append(name)
        parent, _, attribute = name.rpartition(".")
        module.get_submodule(parent).register_module(attribute, found.layer.eval())
        done.append(f"{name}.")
    if not counts:
        raise ModelError("no layer of it is quantized, though its config.json says so")
    _assign(module, {name: _cast(tensor, dtype) for name, tensor in tensors.items()}, tuple(done))
    settings_told = {"layers": dict(counts), "notes": {note: [len(names), names[0]] for note, names in notes.items()}}
    opens: Literal["transformers", "optkit"] = "transformers" if method == "bitsandbytes" else "optkit"
    step = Step(f"from_{method.replace('-', '_')}", settings_told, "real", opens)
    return (module.to("meta") if only_shapes else module), step


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and name}


def _refuse_bias(old: nn.Module, new: nn.Module, name: str) -> None:
    if (old.bias is None) != (new.bias is None):
        raise ModelError(f"{name}.bias is {'missing' if new.bias is None else 'stored, and the model has none'}")


def _dtype(module: nn.Module, tensors: dict[str, Tensor]) -> torch.dtype:
    dtype = module.config.dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    found = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    module.config.dtype = found
    return found


def _tensors(place: Path, only_shapes: bool) -> dict[str, Tensor]:
    paths = sorted(place.glob("*.safetensors"))
    if not paths:
        other = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(place.glob(pattern))), None)
        told = f"; {other} is not opened, because its format can run code: convert it to safetensors" if other else ""
        raise ModelError(f"there are no *.safetensors{told}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in tensors:
                        raise ModelError(f"{name} stands in two files")
                    empty = only_shapes and name.endswith(_MATRICES)
                    tensors[name] = _outline(file.get_slice(name)) if empty else file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} is damaged: {error}") from None
    return tensors


def _outline(part: Any) -> Tensor:
    from transformers.modeling_utils import str_to_torch_dtype

    return torch.empty(part.get_shape(), dtype=str_to_torch_dtype[part.get_dtype()], device="meta")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _assign(module: nn.Module, tensors: dict[str, Tensor], done: tuple[str, ...]) -> None:
    """Put the tensors into all but the layers that are ``done``; tied ones stay tied."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    if any(module.get_submodule(name[:-1]) is head for name in done):
        module.config.tie_word_embeddings = False  # type: ignore[union-attr]  # the head has numbers of its own
    else:
        module.tie_weights()  # type: ignore[operator]
    named = list(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    twins = {name: first[id(parameter)] for name, parameter in named if first.setdefault(id(parameter), name) != name}
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(done)}
    ignored = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    foreign = [name for name in tensors if name not in state and not _is_idle(name, ignored)]
    missing = sorted(state.keys() - tensors.keys() - twins.keys())
    for twin, name in twins.items():
        if name in missing and twin in tensors:
            missing.remove(name)
            tensors[name] = tensors[twin]
    if missing or foreign:
        raise ModelError(
            f"its tensors do not fit {type(module).__name__}: {len(missing)} are missing {missing[:3]}, "
            f"{len(foreign)} have no place {sorted(foreign)[:3]}"
        )
    wrong = [name for name, tensor in tensors.items() if name in state and tensor.shape != state[name].shape]
    if wrong:
        shapes = tuple(tensors[wrong[0]].shape), tuple(state[wrong[0]].shape)
        raise ModelError(f"{wrong[0]} is {shapes[0]}, expected {shapes[1]}")
    module.load_state_dict({name: tensor for name, tensor in tensors.items() if name in state}, strict=False, assign=True)
    for twin, name in twins.items():  # assigning has put a new tensor in the place of one of them alone
        parent, _, attribute = twin.rpartition(".")
        module.get_submodule(parent).register_parameter(attribute, module.get_parameter(name))


def _is_idle(name: str, ignored: list[re.Pattern[str]]) -> bool:
    return name.endswith((".inv_freq", ".masked_bias", ".g_idx")) or any(pattern.search(name) for pattern in ignored)
