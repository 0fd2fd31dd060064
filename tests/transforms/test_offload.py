"""What offload accepts and refuses, on shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.transforms import Compile, Int4, KvCache, Offload, Plan, TensorParallel, Transform

Subjects = Callable[..., Subject]


def check(transform: Transform, build: Callable[[], Subject]) -> None:
    with torch.device("meta"):
        transform.check(Plan(build()))


def test_memory_is_given_in_words_or_in_bytes() -> None:
    assert Offload.model_validate({"host_memory": "30MB"}).host_memory == 30_000_000
    assert Offload.model_validate({"host_memory": 1 << 30}).step().settings["host_memory"] == 1 << 30
    for wrong in ("much", -1, 0, True, 1.5):
        with pytest.raises(ValidationError):
            Offload.model_validate({"host_memory": wrong})


@pytest.mark.parametrize(
    "steps", [(KvCache(),), (Compile(),), (Int4(group_size=32),), (Offload(),)], ids=lambda steps: steps[0].step().name
)
def test_what_reads_weights_in_its_own_way_is_refused(subject: Subjects, steps: tuple[Transform, ...]) -> None:
    told = {"kv_cache": "leave out one", "compile": "leave out one", "int4": "is packed", "offload": "name offload once"}
    with pytest.raises(TransformError, match=told[steps[0].step().name]):
        check(Offload(host_memory=1000), lambda: steps[0].apply(subject()))


def test_parts_of_a_model_are_held_in_memory(subject: Subjects) -> None:
    with pytest.raises(TransformError, match="held in memory whole; leave out offload"):
        check(TensorParallel(size=2), lambda: Offload().apply(subject()))


def test_a_memory_in_which_all_weights_fit_is_refused_with_their_size(subject: Subjects) -> None:
    check(Offload(host_memory=100_000), subject)
    with pytest.raises(TransformError, match=r"all 0\.\d MB of weights fit into host_memory"):
        check(Offload(host_memory="1GB"), subject)  # type: ignore[arg-type]
