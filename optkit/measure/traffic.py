"""Bytes that one token must read, and how fast this machine can read at all. Cache traffic of keys and values is not counted."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import nn

from optkit.core.device import CPU


def weight_bytes_per_token(module: nn.Module) -> int:
    """Return the bytes of weights that generating one token reads: every matrix once, of an embedding one row.

    An upper bound for models that choose among experts: all of them are counted.
    """
    total = 0
    seen: set[int] = set()
    tables = []
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            tables.append(layer)
        elif hasattr(layer, "weight_bytes"):
            total += int(layer.weight_bytes)  # type: ignore[arg-type]
        else:
            for tensor in layer.parameters(recurse=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    total += tensor.numel() * tensor.element_size()
    for table in tables:
        weight = table._parameters.get("weight")
        if weight is None or id(weight) not in seen:  # a tied head has counted its table already
            total += table.embedding_dim * (1 if weight is None else weight.element_size())
    return int(total)


def read_bandwidth(size_bytes: int, repeats: int = 12, device: torch.device = CPU) -> float:
    """Return bytes per second of a read-only sweep over a buffer of this size by the whole device: the median of the repeats."""
    buffer = torch.ones(max(size_bytes, 1 << 20) // 4, dtype=torch.int32, device=device)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.max().item()
        rates.append(buffer.numel() * 4 / (time.perf_counter() - start))
    return median(rates)


def parameters_of(module: nn.Module) -> int:
    """Return how many parameters there are, packed weights counted as the numbers that they stand for."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear) and hasattr(layer, "weight_bytes"))
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    return packed + sum(parameter.numel() for parameter in module.parameters())
