"""Matrices of a given rank, and what is lost by them: pure functions of weights and of the moments of what they read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rank_within(rows: int, columns: int, ratio: float) -> int:
    """Return the largest rank whose two factors have at most ``1 - ratio`` of the weights of a (rows, columns) matrix."""
    return int((1 - ratio) * rows * columns / (rows + columns))


def energies(weight: Tensor, gram: Tensor, loud: Tensor | None = None) -> Tensor:
    """Return the squared singular values of R W L, falling, in float64 (out,); see ``truncated``.

    They say what each direction adds to the mean square of the outputs, weighted by ``loud`` where it is given.
    """
    exact = _weighted(weight, None if loud is None else _root(loud))
    squares: Tensor = torch.linalg.eigvalsh(exact @ gram.double() @ exact.T)
    return squares.flip(0).clamp(min=0)


def allotted(layers: Mapping[str, tuple[Tensor, int, int]], ratio: float) -> dict[str, int]:
    """Return a rank for each layer but those that stay as they are, so that all together lose ``ratio`` of their weights or a little more.

    The law: of all such ranks those with the least sum of what the layers lose, found by one price for a weight in all layers.

    Args:
        layers: for each its ``energies``, its rows and its columns.
        ratio: share of the weights to be removed.
    """
    options = {}
    for name, (energy, rows, columns) in layers.items():
        most = rank_within(rows, columns, 0.0)
        lost = energy.sum() - energy.cumsum(0)[: max(1, most)]
        costs = torch.arange(1, len(lost) + 1, dtype=torch.float64) * (rows + columns)
        options[name] = torch.cat([lost, lost.new_zeros(1)]), torch.cat([costs, costs.new_tensor([rows * columns])])
    wanted = (1 - ratio) * sum(rows * columns for _, rows, columns in layers.values())

    def at(price: float) -> tuple[dict[str, int], float]:
        chosen = {name: int((lost + price * costs).argmin()) for name, (lost, costs) in options.items()}
        return chosen, sum(float(options[name][1][index]) for name, index in chosen.items())

    low, high = -200.0, 200.0  # the logarithm of the price
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if at(2**middle)[1] <= wanted else (middle, high)
    chosen, _ = at(2**high)
    return {name: index + 1 for name, index in chosen.items() if index < len(options[name][0]) - 1}


@torch.no_grad()
def truncated(weight: Tensor, rank: int, gram: Tensor | None = None, loud: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return factors (rank, in) and (out, rank) of the nearest matrix of that rank to a weight (out, in).

    The law: with gram = L L^T, loud = R^T R and the singular value decomposition R W L = U S V^T, the product of R^-1 U_r and U_r^T R W
    has the least error ||R (W' - W) L||: that of the outputs (SVD-LLM: Wang et al. 2024, arXiv 2403.07378), weighted by how much the loss
    hears of it, in second order and with the inputs and the gradients taken as independent (K-FAC: Martens and Grosse 2015, arXiv
    1503.05671). No inverse of L is needed, so a gram that is not of full rank does no harm. Without a gram, L is the identity, and the
    error is that of the weights.

    Args:
        weight: (out, in), floats.
        rank: of the product.
        gram: (in, in), the mean of x x^T over the calibration inputs.
        loud: (out, out), the mean of g g^T over the gradients g = dL/dy of the outputs, or (out,), its diagonal; None: all alike.
    """
    root = None if loud is None else _root(loud)
    exact = _weighted(weight, root)
    squared = exact @ exact.T if gram is None else exact @ gram.double() @ exact.T  # U S^2 U^T
    left = torch.linalg.eigh(squared).eigenvectors[:, -rank:]
    up = left
    if root is not None:
        up = left / root[:, None] if root.ndim == 1 else torch.linalg.solve_triangular(root, left, upper=True)
    return (left.T @ exact).to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


def _weighted(weight: Tensor, root: Tensor | None) -> Tensor:
    if root is None:
        return weight.double()
    return root[:, None] * weight.double() if root.ndim == 1 else root @ weight.double()


def _root(loud: Tensor) -> Tensor:
    """Return R, upper triangular or a diagonal; a little more than 0 where the loss has heard nothing."""
    exact = loud.double()
    if exact.ndim == 1:
        return (exact + 1e-4 * exact.mean() + 1e-30).sqrt()
    exact = exact + torch.eye(len(exact), dtype=exact.dtype) * (3e-3 * exact.diagonal().mean() + 1e-30)
    root: Tensor = torch.linalg.cholesky(exact, upper=True)
    return root
