"""A model larger than the memory it is given: layers that do not fit wait in host memory or on disk, and are read when it is their turn.

Both the placement and the reading are accelerate's (https://huggingface.co/docs/accelerate/usage_guides/big_modeling).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optkit.core.device import CPU
from optkit.kernels.packed import PackedLayer

Placement = dict[str, int | str]  # of modules by name: a CUDA device, "cpu" or "disk"


def refusal(module: nn.Module) -> str | None:
    """Return why the layers of a module cannot be read when it is their turn, or None where they can."""
    packed = next((name for name, layer in module.named_modules() if isinstance(layer, PackedLayer)), None)
    if packed is not None:
        return f"{packed} is packed, and would have to be laid out anew for its kernel at every reading"
    return None


def placement(module: nn.Module, host_memory: int | None, device_memory: int | None, device: torch.device = CPU) -> Placement:
    """Return where each part of a module belongs, blocks kept whole; its tensors may be on the meta device.

    Args:
        module: the model, its weights tied as they shall be.
        host_memory: bytes of weights to hold in host memory, the largest layer that is read from disk included; None: what is free.
        device_memory: the same of a CUDA device; None: nine tenths of what is free there.
        device: where it computes.
    """
    from accelerate import infer_auto_device_map
    from psutil import virtual_memory

    most: dict[Any, int] = {"cpu": virtual_memory().available if host_memory is None else host_memory}
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * 9 // 10 if device_memory is None else device_memory
        most = {device.index or 0: free} | most
    whole = getattr(module, "_no_split_modules", None) or []
    found: Placement = infer_auto_device_map(module, most, no_split_module_classes=list(whole), offload_buffers=True)
    return found


def on_disk(names: Mapping[str, Any], placed: Placement) -> set[str]:
    """Return which tensors stay on disk."""
    return {name for name in names if _place(name, placed) == "disk"}


def dispatch(module: nn.Module, placed: Placement, files: Mapping[str, tuple[Path, str]], device: torch.device = CPU) -> nn.Module:
    """Move the parts of a module to their places, and let each be read when it is its turn.

    Args:
        module: with all tensors that do not stay on disk.
        placed: where they belong.
        files: of each tensor on disk the safetensors file, and its name there.
        device: where it computes.
    """
    from accelerate import dispatch_model

    index = {name: {"safetensors_file": str(path), "weight_name": stored} for name, (path, stored) in files.items()}
    main = "cpu" if device.type == "cpu" else device.index or 0
    moved: nn.Module = dispatch_model(module, placed, main_device=main, offload_index=index or None, offload_buffers=True, force_hooks=True)
    return moved


def is_offloaded(module: nn.Module) -> bool:
    """Say whether some of a module's layers are read when it is their turn."""
    return getattr(module, "hf_device_map", None) is not None


def explain(module: Any) -> str:
    """Return where an offloaded module has its weights."""
    shares = bytes_by_place(module, module.hf_device_map).items()
    return f"weights on {', '.join(f'{place}: {size / 1e6:.1f} MB' for place, size in shares)}, read by accelerate"


def bytes_by_place(module: nn.Module, placed: Placement) -> dict[str, int]:
    """Return the bytes of weights in each place, tied ones once."""
    sums: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            place = str(_place(name, placed))
            sums[place] = sums.get(place, 0) + tensor.numel() * tensor.element_size()
    return sums


def _place(name: str, placed: Placement) -> int | str:
    while name not in placed:
        name = name.rpartition(".")[0]
    return placed[name]
