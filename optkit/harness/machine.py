"""The laws of this machine, by kind of model, kept in the user's cache: what ``optkit law`` has fitted and ``optkit plan`` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.core import files
from optkit.core.cache import cache_folder
from optkit.core.environment import environment
from optkit.measure.law import Law
from optkit.transforms import Compile, Dtype, Int4, Int8, Transform

KINDS: Mapping[str, Sequence[Transform]] = {
    "float32": (Dtype(dtype="float32"),),
    "bfloat16": (Dtype(dtype="bfloat16"),),
    "int8": (Dtype(dtype="float32"), Int8()),
    "int4": (Dtype(dtype="float32"), Int4()),
    "float32-compiled": (Dtype(dtype="float32"), Compile()),
    "bfloat16-compiled": (Dtype(dtype="bfloat16"), Compile()),
    "int8-compiled": (Dtype(dtype="float32"), Int8(), Compile()),
    "int4-compiled": (Dtype(dtype="float32"), Int4(), Compile()),
}
_SCHEMA = 2


def known_laws(threads: int) -> dict[str, Law]:
    """Return the laws that were fitted on this machine with so many threads; none where that was not done."""
    place = _place(threads)
    if place is None or not place.exists():
        return {}
    found = files.read_json(place)
    return {kind: Law.of(plain) for kind, plain in found["laws"].items()} if found.get("schema") == _SCHEMA else {}


def keep_laws(threads: int, laws: Mapping[str, Law]) -> Path | None:
    """Keep laws beside those that are known of other kinds; return where, or None where there is no cache."""
    place = _place(threads)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        whole = known_laws(threads) | dict(laws)
        files.write_json(
            place, {"schema": _SCHEMA, "machine": _machine(threads), "laws": {kind: law.plain() for kind, law in whole.items()}}
        )
    return place


def _machine(threads: int) -> dict[str, Any]:
    facts = environment()
    return {key: facts[key] for key in ("cpu", "cpu_flags", "cores", "memory_bytes")} | {
        "torch": facts["packages"]["torch"],
        "threads": threads,
    }


def _place(threads: int) -> Path | None:
    cache = cache_folder()
    digest = hashlib.sha256(repr(sorted(_machine(threads).items())).encode()).hexdigest()[:16]
    return None if cache is None else cache / "machine" / f"{digest}.json"
