"""Writes a packed model as compressed-tensors, which plain transformers and vLLM open. Only what the format can say exactly is written:
whole zero points, and scales in a dtype that holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optkit.core import files
from optkit.core.errors import ModelError
from optkit.core.subject import Subject
from optkit.kernels.bnb import BitsandbytesLinear
from optkit.kernels.int4 import Int4Linear
from optkit.kernels.int8 import Int8Embedding, Int8Linear
from optkit.kernels.layout import unpack_nibbles
from optkit.kernels.packed import PackedLayer, PackedLinear
from optkit.kernels.w8a8 import W8A8Linear
from optkit.models.artefact import distinct_tensors, save_tensors
from optkit.models.interchange.words import pack_words
from optkit.models.skeleton import is_pretrained

_SYMMETRIC = 8  # the zero point of symmetric numbers 0..15


class Scheme(NamedTuple):
    """How a layer is stored; layers of one scheme make one group."""

    bits: int
    group_size: int | None  # None: one scale a row
    symmetric: bool
    inputs: str | None = None  # how inputs are rounded: "dynamic" by row, or "static"


class Written(NamedTuple):
    """A layer in the words of compressed-tensors."""

    scheme: Scheme
    tensors: dict[str, Tensor]


def export_compressed_tensors(subject: Subject, folder: Path) -> str:
    """Write the model to a new folder and return what its card says of loaders.

    Raises:
        ModelError: a layer cannot be said exactly in the format; it is named, with the remedy.
        ArtefactError: the folder holds something already.
    """
    module = subject.module
    if not is_pretrained(module):
        raise ModelError(f"only transformers models can be exported; this is a {type(module).__name__}")
    written, dense = _written(module)
    if not written:
        raise ModelError("no layer of this model is packed in int4 or int8; a plain model opens in transformers as it is")
    _refuse_mixed(written)
    dtype = _dtype(module, written)
    tensors = _dense_tensors(module, {*written, *dense}, dtype)
    for name, layer in dense.items():
        tensors[f"{name}.weight"] = layer.dequantize(dtype)
    for name, (_, own) in written.items():
        tensors |= {f"{name}.{key}": tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in own.items()}
    card = _card(subject, written, list(dense), dtype)
    with files.build_folder(folder) as aside:
        module.config.save_pretrained(aside)  # type: ignore[operator,union-attr]
        config = files.read_json(aside / "config.json") | {"quantization_config": _config(written)}
        files.write_json(
            aside / "config.json", config | {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(module).__name__]}
        )
        for part in (getattr(module, "generation_config", None), subject.tokenizer):
            if part is not None:
                part.save_pretrained(aside)
        save_tensors(tensors, aside)
        files.write_text(aside / "README.md", card)
    return card


def _written(module: nn.Module) -> tuple[dict[str, Written], dict[str, PackedLayer]]:
    """Return the layers in the words of the format, and the packed embeddings that have to be written as floats."""
    written: dict[str, Written] = {}
    dense: dict[str, PackedLayer] = {}
    refused: dict[str, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, Int8Embedding):
            dense[name] = layer
        elif isinstance(layer, PackedLinear) and layer.tied is not None:
            continue  # its weight is that of the embedding, in the file too
        elif type(layer) in WRITERS:
            try:
                written[name] = WRITERS[type(layer)](layer)
            except ModelError as error:
                refused[name] = str(error)
        elif isinstance(layer, BitsandbytesLinear):
            refused[name] = "a layer of bitsandbytes; optkit.save writes it as transformers opens it, so there is nothing to export"
        elif isinstance(layer, PackedLayer):
            refused[name] = f"{type(layer).__name__} has no form in compressed-tensors here"
    if refused:
        name, reason = next(iter(refused.items()))
        raise ModelError(f"{len(refused)} layers cannot be exported, the first is {name}: {reason}")
    return written, dense


def _int4(layer: Any) -> Written:
    q, scale, point = layer.tensors()
    whole = point.float().round()
    if not torch.equal(whole, point.float()) or bool(((whole < 0) | (whole > 15)).any()):
        raise ModelError(
            "its zero points are no whole numbers from 0 to 15, and compressed-tensors knows no others; "
            "quantize with whole points: int4: {symmetric: true}"
        )
    numbers = unpack_nibbles(q)
    symmetric = bool((whole == _SYMMETRIC).all())
    tensors = {
        "weight_packed": pack_words(numbers, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(numbers.shape, dtype=torch.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(whole.to(torch.uint8).T.contiguous(), 4).T.contiguous()
    return Written(Scheme(4, layer.group_size, symmetric), tensors | _bias(layer))


def _int8(layer: Any) -> Written:
    q, scale = layer.tensors()
    tensors = {
        "weight_packed": pack_words((q.to(torch.int16) + 128).to(torch.uint8), 8),
        "weight_scale": scale[:, None],
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    return Written(Scheme(8, None, True), tensors | _bias(layer))


def _w8a8(layer: Any) -> Written:
    q, scale, *static = layer.tensors()
    tensors = {"weight": q, "weight_scale": scale[:, None]} | ({"input_scale": static[0]} if static else {})
    return Written(Scheme(8, None, True, "static" if static else "dynamic"), tensors | _bias(layer))


def _bias(layer: nn.Module) -> dict[str, Tensor]:
    bias = layer.bias
    return {"bias": bias.detach()} if isinstance(bias, Tensor) else {}


WRITERS: dict[type, Callable[[Any], Written]] = {Int4Linear: _int4, Int8Linear: _int8, W8A8Linear: _w8a8}


def _refuse_mixed(written: dict[str, Written]) -> None:
    """Refuse zero points beside layers of another scheme: transformers opens such files with one scheme for all.

    Raises:
        ModelError: names a layer of each.
    """
    schemes = {layer.scheme: name for name, layer in written.items()}
    pointed = [name for scheme, name in schemes.items() if not scheme.symmetric]
    if pointed and len(schemes) > 1:
        other = next(name for name in schemes.values() if name != pointed[0])
        raise ModelError(
            f"{pointed[0]} has zero points and {other} is stored otherwise, and transformers would read both alike; "
            f"quantize without zero points: int4: {{symmetric: true}}, or leave one of them as it is: targets: {{exclude: [...]}}"
        )


def _dtype(module: nn.Module, written: dict[str, Written]) -> torch.dtype:
    """Return the dtype the model computes in, or float32 where that one does not hold every scale."""
    dtype: torch.dtype = module.get_submodule(next(iter(written))).compute_dtype  # type: ignore[assignment]
    exact = all(torch.equal(scale.to(dtype).float(), scale.float()) for _, own in written.values() for scale in [own["weight_scale"]])
    return dtype if exact else torch.float32


def _dense_tensors(module: nn.Module, packed: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    prefixes = tuple(f"{name}." for name in packed)
    tied = tuple(f"{name}." for name, layer in module.named_modules() if isinstance(layer, PackedLinear) and layer.tied is not None)
    kept = {name: tensor for name, tensor in distinct_tensors(module).items() if not name.startswith(prefixes)}
    kept = {name: tensor for name, tensor in kept.items() if not name.startswith(tied) or name.endswith(".bias")} if tied else kept
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in kept.items()}


def _config(written: dict[str, Written]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True}
    told = {
        None: None,
        "dynamic": {**inputs, "strategy": "token", "dynamic": True},
        "static": {**inputs, "strategy": "tensor", "dynamic": False},
    }
    for number, scheme in enumerate(sorted({layer.scheme for layer in written.values()}, key=str)):
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
        strategy = {"strategy": "channel"} if scheme.group_size is None else {"strategy": "group", "group_size": scheme.group_size}
        groups[f"group_{number}"] = {
            "targets": [name for name, layer in written.items() if layer.scheme == scheme],
            "weights": weights | strategy,
            "input_activations": told[scheme.inputs],
            "output_activations": None,
            "format": "pack-quantized" if scheme.inputs is None else "int-quantized",
        }
    formats = {group["format"] for group in groups.values()}
    shared = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    shared["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
    return {**shared, "config_groups": groups, "ignore": [], "kv_cache_scheme": None, "global_compression_ratio": None}


def _card(subject: Subject, written: dict[str, Written], dense: list[str], dtype: torch.dtype) -> str:
    pointed = any(not layer.scheme.symmetric for layer in written.values())
    call = 'AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")'
    if pointed:
        call = 'AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True))'
    rounded = any(layer.scheme.inputs for layer in written.values())
    counts: dict[Scheme, int] = {}
    for layer in written.values():
        counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
    lines = [
        f"# {subject.source}, as compressed-tensors",
        "",
        "Made by optkit: " + (", ".join(step.name for step in subject.history) or "no transform") + ".",
        "",
        *(f"- {count} linear layers in {_told(scheme)}" for scheme, count in counts.items()),
        *(f"- {name} was packed in int8 and is written as floats of the same values: the format has no packed embedding" for name in dense),
        f"- Everything else, and all scales, in {str(dtype).removeprefix('torch.')}",
        "",
        "Who gains what:",
        "",
        f"- transformers with compressed-tensors: `{call}`. It unpacks the weights when it opens the model: a smaller download,"
        " no smaller memory, no faster tokens.",
        *(["- Without `dequantize=True`, transformers 5.24 with compressed-tensors 0.20 refuses the zero points."] if pointed else []),
        *(["- It rounds inputs otherwise than optkit: the largest value is 127.5 steps, not 127."] if rounded else []),
        "- vLLM reads this layout too and runs it packed; that was not tried here.",
        "- optkit: `optkit run` with this folder as `model:`. It runs packed, memory and tokens gain.",
        "",
    ]
    return "\n".join(lines)


def _told(scheme: Scheme) -> str:
    size = "one scale a row" if scheme.group_size is None else f"groups of {scheme.group_size}"
    points = "" if scheme.symmetric else ", with zero points"
    return f"int{scheme.bits}, {size}{points}" + ("" if scheme.inputs is None else f", inputs rounded to int8 ({scheme.inputs} scales)")
