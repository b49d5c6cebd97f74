"""The change that answers every expert's typical inputs as that expert would: one weighted least-squares problem per matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank
from recall_merge.maths.moments import Moment


def least_squares(
    deltas: Sequence[Delta], moments: Sequence[Moment], weights: Sequence[float], *, ridge: float = 0.0
) -> Float[Tensor, "o i"]:  # fmt: skip
    """argmin_D sum_q w_q tr((D - delta_q) G_q (D - delta_q)^T) + ridge |D|^2 = (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.

    deltas k of (o, i), G_q (i, i). With G_q = E_q[x x^T] each term is w_q E_q|D x - delta_q x|^2, over the inputs x of expert q.
    A moment is a low-rank factor and a diagonal, so the system is diag(d) + V V^T with V (i, k r). While k r < i, Woodbury's identity
    inverts it at a cost linear in i. Of a low-rank delta U L only the few rows of L are solved for: U (L G_q (..)^-1). In float64, as the
    moments must be.

    >>> see, hide = (Moment(torch.zeros(2, 0).double(), rest) for rest in torch.eye(2).double())
    >>> least_squares([torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])], [see, hide], [0.5, 0.5])
    tensor([[1., 2.]], dtype=torch.float64)
    """
    diagonal, factor = system(moments, weights, ridge)
    ups, rows, whole = [], [], torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, moment, weight in zip(deltas, moments, weights, strict=True):
        if isinstance(delta, LowRank):
            ups.append(delta.up.double())
            rows.append(_seen(delta.down, moment, weight))
        else:
            whole += _seen(delta, moment, weight)
    change = _divide(whole, diagonal, factor) if whole.any() else whole
    if rows:
        change.addmm_(torch.cat(ups, dim=1), _divide(torch.cat(rows), diagonal, factor))
    return change


def system(
    moments: Sequence[Moment], weights: Sequence[float], ridge: float
) -> tuple[Float[Tensor, " i"], Float[Tensor, "i kr"]]:  # fmt: skip
    """d and V of sum_q w_q G_q + ridge I = diag(d) + V V^T."""
    diagonal = sum((weight * moment.rest for moment, weight in zip(moments, weights, strict=True)), torch.zeros_like(moments[0].rest))
    return diagonal + ridge, torch.cat([weight**0.5 * moment.factor for moment, weight in zip(moments, weights, strict=True)], dim=1)


def condition_bound(moments: Sequence[Moment], weights: Sequence[float], *, ridge: float) -> float:
    """An upper bound of the condition number of the system: what the solve can lose is this times 1e-16.

    Its eigenvalues lie between the smallest of d and the largest of d plus |V|^2.
    """
    diagonal, factor = system(moments, weights, ridge)
    return float((diagonal.max() + torch.linalg.matrix_norm(factor, 2).square()) / diagonal.min()) if factor.numel() else 1.0


def _seen(change: Float[Tensor, "n i"], moment: Moment, weight: float) -> Float[Tensor, "n i"]:
    """weight * change G, in float64."""
    change = change.double()
    return torch.addmm(change * moment.rest, change @ moment.factor, moment.factor.mT).mul_(weight)


def _divide(seen: Float[Tensor, "n i"], diagonal: Float[Tensor, " i"], factor: Float[Tensor, "i kr"]) -> Float[Tensor, "n i"]:
    """seen (diag(d) + V V^T)^-1; by Woodbury's identity, (..)^-1 = D^-1 - D^-1 V (I + V^T D^-1 V)^-1 V^T D^-1."""
    size, columns = factor.shape
    if columns >= size:
        return torch.linalg.solve(factor @ factor.mT + torch.diag(diagonal), seen, left=False)
    left = seen / diagonal
    if not columns:
        return left
    scaled = factor / diagonal.unsqueeze(1)  # D^-1 V
    core = factor.mT @ scaled
    core.diagonal().add_(1)
    return left.sub_(torch.linalg.solve(core, (left @ factor).mT).mT @ scaled.mT)
