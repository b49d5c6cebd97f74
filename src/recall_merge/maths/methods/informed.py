"""Methods that need statistics of the experts' data: Fisher, RegMean, LM-Cocktail's weights.

Plain functions of those statistics, in the form of merge functions. They are no rows of the table: what a run gives a method are deltas and
weights, and these want an expert's card besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank, dense
from recall_merge.maths.methods.consensus import weighted_sum
from recall_merge.maths.methods.pieces import in_pieces


def fisher(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], informations: Sequence[Tensor], *, floor: float = 1e-6
) -> Tensor:
    """Average of the experts, entry by entry by how much each expert's predictions depend on the entry.

    theta = theta_0 + sum_q w_q F_q delta_q / sum_q w_q F_q = sum_q w_q F_q theta_q / sum_q w_q F_q.    base, deltas, F_q all (*s) -> (*s)
    F_q >= 0 is the diagonal of expert q's Fisher information, the mean over its samples x and its own predictions y of
    (d log p(y | x) / d theta)^2. Every F_q is raised by `floor` times the largest value of all of them, as the paper raises it by a
    small constant: where no expert's predictions depend on an entry, it gets the plain weighted mean.
    Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv:2111.09832, eq. 4.

    >>> fisher(torch.zeros(2), [torch.ones(2), -torch.ones(2)], [0.5, 0.5], [torch.tensor([3.0, 1.0]), torch.ones(2)], floor=0)
    tensor([0.5000, 0.0000])
    """
    k = len(deltas)
    largest = max((float(information.max()) for information in informations if information.numel()), default=0.0)
    least = floor * largest if largest > 0 else 1.0

    def merged(piece: Tensor, *given: Tensor) -> Tensor:
        shares = [(information + least).mul_(weight) for information, weight in zip(given[k:], weights, strict=True)]
        above = sum((change * share for change, share in zip(given[:k], shares, strict=True)), torch.zeros_like(piece))
        return piece + above / sum(shares, torch.zeros_like(piece)).clamp_(min=torch.finfo(piece.dtype).tiny)

    return in_pieces(merged, [base, *deltas, *informations])


def regmean(
    base: Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    moments: Sequence[Tensor],
    *,
    offdiagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Tensor:
    """The linear map that answers each expert's inputs as that expert does, in the least-squares sense.

    W = theta_0 + (sum_q w_q delta_q G_q + rho mean_q delta_q) (sum_q w_q G_q + rho I)^-1.    base (o, i), k of (o, i), G_q (i, i) -> (o, i)
    G_q = X_q^T X_q / n, the second moment of the layer's inputs under expert q, with its off-diagonal entries times `offdiagonal` (the
    paper's alpha). For rho -> 0 this is the paper's (sum G_q)^-1 sum G_q W_q, transposed, as our W maps from the right: W x.
    rho = `ridge` times the mean diagonal of sum_q w_q G_q: directions that no input has get the weighted mean of the deltas.
    Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849, eq. 4. Solved in float64.

    >>> see, hide = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    >>> regmean(torch.zeros(1, 2), [torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])], [0.5, 0.5], [see, hide]).round(decimals=3)
    tensor([[1., 2.]])
    """
    seen, moment = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(base.shape[1], base.shape[1], dtype=torch.float64)
    for delta, weight, own in zip(deltas, weights, moments, strict=True):
        shrunk = own.double() * offdiagonal
        shrunk.diagonal().copy_(own.diagonal())
        if isinstance(delta, LowRank):
            seen.addmm_(delta.up.double(), delta.down.double() @ shrunk, alpha=weight)
        else:
            seen.addmm_(delta.double(), shrunk, alpha=weight)
        moment.add_(shrunk, alpha=weight)
    total = sum(weights)
    rho = ridge * float(moment.diagonal().mean()) or 1.0  # without any input: the weighted mean
    mean = weighted_sum([dense(delta).double() for delta in deltas], [weight / total if total else 0.0 for weight in weights])
    moment.diagonal().add_(rho)
    change = torch.linalg.solve(moment, seen.add_(mean, alpha=rho), left=False)
    return base + change.to(base.dtype)


def cocktail_weights(losses: Sequence[float], *, temperature: float = 5.0) -> list[float]:
    """w_q = exp(-loss_q / T) / sum_p exp(-loss_p / T): one weight a model, from its mean loss on a few labelled rows of the new task.

    Xiao et al. 2023, LM-Cocktail, arXiv:2311.13534, T = 5.

    >>> cocktail_weights([2.0, 2.0])
    [0.5, 0.5]
    """
    return torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0).tolist()
