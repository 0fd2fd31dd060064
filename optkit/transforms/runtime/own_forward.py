"""What transforms share that change how the model's own forward is called."""

from __future__ import annotations

from optkit.core.errors import TransformError
from optkit.core.subject import Subject
from optkit.engines import OWN_CACHE


def refuse_other_engines(subject: Subject, name: str, others: tuple[str, ...] = ()) -> None:
    """Refuse a subject that is no causal language model, the same transform twice, and engines that call no forward of its own.

    Raises:
        TransformError: with what to leave out.
    """
    if subject.kind != "causal-lm":
        raise TransformError(f"{name} is for causal language models, and this is none; leave it out")
    taken = {step.name for step in subject.history}
    if name in taken:
        raise TransformError(f"{name} stands there already; name it once")
    meets = sorted(taken & (OWN_CACHE | {"kv_cache", "ensemble", "offload", *others}))
    if meets:
        raise TransformError(f"{meets[0]} has an engine of its own, which {name} does not reach; leave out one of them")
