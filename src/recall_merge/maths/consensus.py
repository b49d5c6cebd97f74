"""One change out of several: the weighted sum, or the mean of those that agree on a sign."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from recall_merge.maths.deltas import Deltas, Dense, Weights

Elect = Annotated[
    Literal["weighted", "unweighted", "count"],
    "what elects an entry's sign: the sum of weighted deltas (as mergekit), of deltas (as peft), or the number of deltas of either sign",
]
Mean = Annotated[
    Literal["weights", "count", "none"],
    "the sum of agreeing weighted deltas is divided by their weights (as mergekit), by the share of deltas that agree (as peft), or not",
]


def weighted_sum(deltas: Deltas, weights: Weights) -> Dense:
    """sum_q w_q delta_q.

    >>> weighted_sum([torch.ones(2), 3 * torch.ones(2)], [0.5, 0.5])
    tensor([2., 2.])
    """
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def agreeing(deltas: Deltas, weights: Weights, *, elect: Elect = "weighted", mean: Mean = "weights") -> Dense:
    """sum_{q in A} w_q delta_q / sum_{q in A} w_q, A = {q : sign(delta_q) = s}, s the elected sign, entry by entry.

    s is the sign of sum_q w_q delta_q, or as `elect` says of sum_q delta_q or sum_q sign(delta_q); `mean` can change the divisor.
    An even vote elects +. A delta of 0 agrees with nobody, and where nobody agrees the result is 0. Experts of weight 0 have no vote.

    >>> agreeing([torch.tensor([1.0, 1.0]), torch.tensor([3.0, -3.0])], [0.5, 0.5])
    tensor([ 2., -3.])
    """
    voters = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    if not voters:
        return torch.zeros_like(deltas[0])
    if elect == "weighted":
        votes = weighted_sum(*zip(*voters, strict=True))
    else:
        ballots = [delta.sign() if elect == "count" else delta for delta, _ in voters]
        votes = weighted_sum(ballots, [1.0] * len(ballots))
    sign = votes.sign_().add_(0.5).sign_()  # subtle: +1 for an even vote too
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in voters:
        size = (delta * sign).clamp_min_(0)  # |delta| where it agrees, else 0
        total.add_(size, alpha=weight)
        if mean != "none":
            divisor.add_(size.sign_(), alpha=weight if mean == "weights" else 1 / len(deltas))
    if mean != "none":
        total.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny))
    return total.mul_(sign)
