"""Our own method: every layer of the merged model answers each expert's typical inputs as that expert does, as well as one matrix can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank, dense
from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.registry import method
from recall_merge.maths.moments import Moment, identity

Keep = Annotated[float, Interval(ge=0, le=1), "off-diagonal entries of the moments are multiplied by this; 0 uses their diagonals alone"]
Tokens = Annotated[
    Literal["weighted", "alike"], "weighted: a token counts by how much the expert's predictions depend on it there; alike: as any other"
]
Ridge = Annotated[float, Interval(gt=0), "added to the sum of moments, whose mean diagonal is 1"]


@method("aligned", source="this project, after RegMean, Jin et al. 2023, arXiv:2212.09849", factors=True, matrices=True)
def aligned(
    base: Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment | None] = (),
    tokens: Tokens = "alike",
    keep: Keep = 0.9,
    ridge: Ridge = 1e-6,
    scale: Scale = 1.0,
) -> Tensor:
    """Least squares over the experts' typical inputs, from their cards: no text and no old data.

    W = theta_0 + scale * (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.    base (o, i), k of (o, i), G_q (i, i) -> (o, i)

    It minimises sum_q w_q E_q s |W x - theta_q x|^2 over W, where E_q runs over the layer's inputs x under expert q: the average where the
    experts' inputs overlap, each expert's own change where they do not. s = |g|^2 is how much expert q's own predictions depend on what
    its layer makes of x, g the gradient of their log-likelihood by the layer's output (the trace of K-FAC's output factor, token by
    token), with `tokens: weighted`; else 1. G_q = E_q[s x x^T] / E_q[s] comes from expert q's card as a low-rank factor and a diagonal,
    scaled to a mean diagonal of 1 so that no expert counts for more because its inputs are larger. The ridge is small beside all inputs but
    the dead ones: a few inputs may be a thousand times larger than the rest, which then are a thousandth of the mean.
    Departures from RegMean: deltas to the base instead of weights (what no expert uses stays the base's), moments of a few typical
    samples, cut to a few directions, and scaled. An expert without a card has the identity as its moment. Tensors that are no linear
    maps, and those of which no card tells, get theta_0 + scale * sum_q w_q delta_q.

    The moments' sum is D + V V^T with D diagonal and V (i, k r): it is inverted by Woodbury's identity in float64 at a cost linear in i,
    (D + V V^T)^-1 = D^-1 - D^-1 V (I + V^T D^-1 V)^-1 V^T D^-1.

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
    known = [_moment(moment, base.shape[1], tokens, keep) for moment in moments]
    seen = torch.zeros(base.shape, dtype=torch.float64)
    for delta, share, moment in zip(deltas, shares, known, strict=True):
        _add_seen(seen, delta, moment, share)
    solved = _divide(seen, known, shares, ridge)
    return base + solved.mul_(scale * total).to(base.dtype)


def condition(
    moments: Sequence[Moment | None], weights: Sequence[float], *, tokens: str = "alike", keep: float = 0.9, ridge: float = 1e-6
) -> float:
    """An upper bound of the condition number of sum_q w_q G_q + ridge I: what the solve can lose is this times 1e-16.

    Its eigenvalues lie between the smallest of its diagonal part and the largest of that plus |V|^2.
    """
    size = next(len(moment.rest) for moment in moments if moment is not None)
    known = [_moment(moment, size, tokens, keep) for moment in moments]
    total = sum(weights) or 1.0
    diagonal, factor = _sum(known, [weight / total for weight in weights], ridge)
    return float((diagonal.max() + torch.linalg.matrix_norm(factor, 2).square()) / diagonal.min()) if factor.numel() else 1.0


def _moment(moment: Moment | None, size: int, tokens: str, keep: float) -> Moment:
    """A card's moment as the solve takes it: the identity without a card, the plain one where no gradient reached the map."""
    if moment is None:
        return identity(size)
    chosen = moment.weighted if tokens == "weighted" and moment.weighted is not None else moment
    return chosen.shrunk(keep)


def _add_seen(seen: Tensor, delta: Delta, moment: Moment, share: float) -> None:
    """seen += share * delta G, with G = F F^T + diag(r); a low-rank delta stays low-rank until it is added."""
    if isinstance(delta, LowRank):
        down = delta.down.double()
        seen.addmm_(delta.up.double(), (down @ moment.factor) @ moment.factor.mT + down * moment.rest, alpha=share)
    else:
        delta = delta.double()
        seen.addmm_(delta @ moment.factor, moment.factor.mT, alpha=share).addcmul_(delta, moment.rest, value=share)


def _sum(moments: Sequence[Moment], shares: Sequence[float], ridge: float) -> tuple[Tensor, Tensor]:
    """D (i,) and V (i, k r) of sum_q share_q G_q + ridge I = diag(D) + V V^T."""
    diagonal = sum((share * moment.rest for moment, share in zip(moments, shares, strict=True)), torch.zeros_like(moments[0].rest))
    return diagonal + ridge, torch.cat([share**0.5 * moment.factor for moment, share in zip(moments, shares, strict=True)], dim=1)


def _divide(seen: Tensor, moments: Sequence[Moment], shares: Sequence[float], ridge: float) -> Tensor:
    """seen (diag(D) + V V^T)^-1 by Woodbury's identity."""
    diagonal, factor = _sum(moments, shares, ridge)
    left = seen / diagonal  # (o, i)
    if not factor.shape[1]:
        return left
    scaled = factor / diagonal.unsqueeze(1)  # D^-1 V
    core = factor.mT @ scaled
    core.diagonal().add_(1)
    return left.sub_(torch.linalg.solve(core, (left @ factor).mT).mT @ scaled.mT)
