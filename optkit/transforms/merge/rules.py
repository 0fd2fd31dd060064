"""Averages of checkpoints: pure functions of state dicts with equal names and shapes. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from optkit.core.errors import TransformError

State = Mapping[str, Tensor]
_PARALLEL = 1e-6


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted mean of states; of equal weights where none are given (uniform soup: Wortsman et al. 2022, arXiv 2203.05482).

    Raises:
        TransformError: the states do not fit one another, or the weights sum to zero.
    """
    refuse_unlike(states)
    shares = list(weights) if weights is not None else [1.0] * len(states)
    total = math.fsum(shares)
    if len(shares) != len(states) or abs(total) < 1e-12:
        raise TransformError(f"{len(states)} models need as many weights, of a sum that is not zero; got {shares}")
    return _by_name(states, lambda *tensors: sum(t * (share / total) for t, share in zip(tensors, shares, strict=True)))


def slerp(one: State, other: State, share: float) -> dict[str, Tensor]:
    """Return the point at ``share`` of the way from one state to another, tensor by tensor along a great circle.

    The law: with the angle a between two tensors as vectors, sin((1 - t) a) / sin(a) of the one plus sin(t a) / sin(a) of the other
    (Shoemake 1985). Tensors of nearly one direction are averaged along a straight line.

    Raises:
        TransformError: the states do not fit one another.
    """
    refuse_unlike([one, other])

    def between(a: Tensor, b: Tensor) -> Tensor:
        lengths = a.norm() * b.norm()
        cosine = float(((a * b).sum() / lengths).clamp(-1, 1)) if float(lengths) > 0 else 1.0
        angle = math.acos(cosine)
        if math.sin(angle) < _PARALLEL:
            return (1 - share) * a + share * b
        return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)

    return _by_name([one, other], between)


def task_arithmetic(base: State, others: Sequence[State], scale: float = 1.0) -> dict[str, Tensor]:
    """Return base + scale * sum of (other - base): what each other one has learned since, added up (Ilharco et al. 2022, arXiv 2212.04089).

    Raises:
        TransformError: the states do not fit one another.
    """
    refuse_unlike([base, *others])
    return _by_name([base, *others], lambda first, *rest: first + scale * sum(tensor - first for tensor in rest))


def greedy_soup(states: Sequence[State], loss_of: Callable[[State], float]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the average of those states that improve it, and which they are (greedy soup: Wortsman et al. 2022, arXiv 2203.05482).

    They are tried from the best on, and one is taken in if the average with it has no greater loss than without.

    Raises:
        TransformError: the states do not fit one another.
    """
    refuse_unlike(states)
    losses = [loss_of(state) for state in states]
    order = sorted(range(len(states)), key=losses.__getitem__)
    chosen, least = [order[0]], losses[order[0]]
    for index in order[1:]:
        loss = loss_of(average([states[i] for i in (*chosen, index)]))
        if loss <= least:
            chosen.append(index)
            least = loss
    return average([states[i] for i in chosen]), sorted(chosen)


def refuse_unlike(states: Sequence[State]) -> None:
    """Refuse states of other names or shapes than the first; the first difference is named.

    Raises:
        TransformError: there is one.
    """
    first = {name: tensor.shape for name, tensor in states[0].items()}
    for number, state in enumerate(states[1:], 2):
        other = {name: tensor.shape for name, tensor in state.items()}
        wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if wrong:
            sizes = [str(tuple(found[wrong[0]])) if wrong[0] in found else "not there" for found in (first, other)]
            raise TransformError(
                f"model {number} of {len(states)} has another shape than the first: {wrong[0]} is {sizes[1]}, not {sizes[0]} "
                f"({len(wrong)} tensors differ); only models of one shape can be merged"
            )


@torch.no_grad()
def _by_name(states: Sequence[State], rule: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Apply a rule in float32 to the tensors of each name; whole numbers, such as counters, are those of the first state."""
    merged = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            merged[name] = rule(*(state[name].float() for state in states)).to(tensor.dtype)
        else:
            merged[name] = tensor.clone()
    return merged
