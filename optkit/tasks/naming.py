"""The classes of data and those of a model that was trained elsewhere: the same, in another order or under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optkit.core.errors import DataError
from optkit.core.subject import Subject


def places_of(labels: Sequence[str], subject: Subject, called: Mapping[str, str]) -> Tensor | None:
    """Return which of the model's outputs belongs to each of these classes, by the names that its configuration gives them.

    None where it has none, or only such as LABEL_0: then the outputs stand for the sorted classes.

    Args:
        labels: the classes of the data.
        subject: the model.
        called: the model's name for a class of the data, where it has another.

    Raises:
        DataError: the model knows no such class, or not as many.
    """
    config = getattr(subject.module, "config", None)
    known = {name.lower(): number for name, number in (getattr(config, "label2id", None) or {}).items()}
    if not known:
        return None
    wanted = [called.get(label, label).lower() for label in labels]
    missing = [label for label, name in zip(labels, wanted, strict=True) if name not in known]
    if not missing:
        return torch.tensor([known[name] for name in wanted])
    if all(name.startswith("label_") for name in known) and len(known) == len(labels):
        return None
    raise DataError(
        f"model {subject.source!r} knows the classes {', '.join(known)}, and not {', '.join(missing)}; "
        f"say what it calls them: called: {{{missing[0]}: {next(iter(known))}}}"
    )
