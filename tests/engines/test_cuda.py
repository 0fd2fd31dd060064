"""Engines on a GPU give what the processor gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optkit.engines import CompiledEngine, EagerEngine
from optkit.transforms import Int4, Int8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("without_kernels"),  # those of some processors round what many rows multiply
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


@pytest.mark.parametrize("change", [None, Int8(), Int4(group_size=32)], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize("kind", [EagerEngine, CompiledEngine])
def test_a_request_gives_the_logits_of_the_processor(tiny_llama: Any, ids: torch.Tensor, kind: Any, change: Any) -> None:
    module = tiny_llama(hidden_size=128, intermediate_size=256)
    module = module if change is None else change.apply(module)
    plain = EagerEngine(module)
    expected = [plain.prefill(ids), plain.step(ids[:, 0]), plain.step(ids[:, 1])]
    engine = kind(module.to("cuda"))
    found = [engine.prefill(ids), engine.step(ids[:, 0]), engine.step(ids[:, 1])]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float().cpu(), other, rtol=0, atol=0.02)
    torch.testing.assert_close(engine.score(ids).float().cpu(), plain_score(module, ids), rtol=0, atol=0.02)


def plain_score(module: Any, ids: torch.Tensor) -> torch.Tensor:
    return EagerEngine(module.to("cpu")).score(ids)
