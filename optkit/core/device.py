"""Where an arm computes: the processor, or a device of CUDA."""

from __future__ import annotations

import torch
from torch import nn

from optkit.core.errors import ResourceError

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """Return the device of ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ResourceError: it is not in this machine, or PyTorch was built without CUDA.
    """
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        built = "" if torch.backends.cuda.is_built() else f", and torch {torch.__version__} was built without CUDA"
        raise ResourceError(f"{name} is not here: {count} CUDA devices are{built}; set device to cpu")
    return device


def place_of(module: nn.Module) -> torch.device:
    """Return where a module's tensors are, of those that have values where some have; the processor for one without any."""
    places = [tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors]
    return next((place for place in places if place.type != "meta"), places[0] if places else CPU)
