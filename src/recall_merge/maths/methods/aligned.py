"""Our own method: every layer of the merged model answers each expert's typical inputs as that expert does, as well as one matrix can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank, dense
from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.registry import method
from recall_merge.maths.moments import Moment, identity

Keep = Annotated[float, Interval(ge=0, le=1), "off-diagonal entries of the moments are multiplied by this; 0 uses their diagonals alone"]
Ridge = Annotated[float, Interval(gt=0), "added to the sum of moments, whose mean diagonal is 1"]


@method("aligned", source="this project, after RegMean, Jin et al. 2023, arXiv:2212.09849", factors=True, matrices=True)
def aligned(
    base: Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment | None] = (),
    keep: Keep = 0.9,
    ridge: Ridge = 1e-6,
    scale: Scale = 1.0,
) -> Tensor:
    """Least squares over the experts' typical inputs, from their statistics: no text and no old data.

    W = theta_0 + scale * (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.    base (o, i), k of (o, i), G_q (i, i) -> (o, i)

    It minimises sum_q w_q E_q |W x - theta_q x|^2 over W, where E_q runs over the layer's inputs x under expert q: the average where the
    experts' inputs overlap, each expert's own change where they do not. G_q = E_q[x x^T] comes from expert q's statistics as a low-rank factor
    and a diagonal, scaled to a mean diagonal of 1 so that no expert counts for more because its inputs are larger. The ridge is small
    beside all inputs but dead ones: a few inputs may be a thousand times as large as the rest, which then lie far below the mean.
    Departures from RegMean: deltas to the base instead of weights (what no expert uses stays the base's), moments of a few typical
    samples, cut to a few directions, and scaled. An expert without input statistics has the identity as its moment. Tensors that are no linear
    maps, and those of which no input statistics tells, get theta_0 + scale * sum_q w_q delta_q.

    The moments' sum is D + V V^T with D diagonal and V (i, k r): while k r < i it is inverted by Woodbury's identity,
    (D + V V^T)^-1 = D^-1 - D^-1 V (I + V^T D^-1 V)^-1 V^T D^-1, at a cost linear in i; in float64. Of a low-rank delta U L only the few
    rows of L are solved for: U (L G_q (..)^-1).

    >>> see, hide = Moment(torch.tensor([[1.0], [0.0]]), torch.zeros(2)), Moment(torch.tensor([[0.0], [1.0]]), torch.zeros(2))
    >>> one, two = torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])
    >>> aligned(torch.zeros(1, 2), [one, two], [0.5, 0.5], moments=[see, hide], keep=1.0, ridge=1e-9)  # each where it has inputs
    tensor([[1., 2.]])
    """
    if base.ndim != 2 or all(moment is None for moment in moments):
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    if not any(weights):
        return base.clone()
    total = sum(weights)
    shares = [weight / total for weight in weights]
    known = [_moment(moment, base.shape[1], keep) for moment in moments]
    system = _sum(known, shares, ridge)
    ups, rows, whole = [], [], torch.zeros(base.shape, dtype=torch.float64)
    for delta, share, moment in zip(deltas, shares, known, strict=True):
        if isinstance(delta, LowRank):
            ups.append(delta.up.double())
            rows.append(_seen(delta.down, moment, share))
        else:
            whole += _seen(delta, moment, share)
    added = _divide(whole, *system) if whole.any() else whole
    if rows:
        added.addmm_(torch.cat(ups, dim=1), _divide(torch.cat(rows), *system))
    return base + added.mul_(scale * total).to(base.dtype)


def condition(moments: Sequence[Moment | None], weights: Sequence[float], *, keep: float = 0.9, ridge: float = 1e-6) -> float:
    """An upper bound of the condition number of sum_q w_q G_q + ridge I: what the solve can lose is this times 1e-16.

    Its eigenvalues lie between the smallest of its diagonal part and the largest of that plus |V|^2.
    """
    size = next(len(moment.rest) for moment in moments if moment is not None)
    known = [_moment(moment, size, keep) for moment in moments]
    total = sum(weights) or 1.0
    diagonal, factor = _sum(known, [weight / total for weight in weights], ridge)
    return float((diagonal.max() + torch.linalg.matrix_norm(factor, 2).square()) / diagonal.min()) if factor.numel() else 1.0


def _moment(moment: Moment | None, size: int, keep: float) -> Moment:
    """input statistics's moment as the solve takes it; the identity without input statistics."""
    return identity(size) if moment is None else moment.shrunk(keep)


def _seen(change: Tensor, moment: Moment, share: float) -> Tensor:
    """share * change G, with G = F F^T + diag(r).    (n, i) -> (n, i) float64"""
    change = change.double()
    return torch.addmm(change * moment.rest, change @ moment.factor, moment.factor.mT).mul_(share)


def _sum(moments: Sequence[Moment], shares: Sequence[float], ridge: float) -> tuple[Tensor, Tensor]:
    """D (i,) and V (i, k r) of sum_q share_q G_q + ridge I = diag(D) + V V^T."""
    diagonal = sum((share * moment.rest for moment, share in zip(moments, shares, strict=True)), torch.zeros_like(moments[0].rest))
    return diagonal + ridge, torch.cat([share**0.5 * moment.factor for moment, share in zip(moments, shares, strict=True)], dim=1)


def _divide(seen: Tensor, diagonal: Tensor, factor: Tensor) -> Tensor:
    """seen (diag(D) + V V^T)^-1.    (n, i) -> (n, i)"""
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
