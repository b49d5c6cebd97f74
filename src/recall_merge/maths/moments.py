"""Second moments of a linear layer's inputs, stored as a few directions and a diagonal; and the least-squares problem that they pose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Dense, Factored, LowRank, Weights


@dataclass(frozen=True)
class Moment:
    """The inputs x of a linear map, by an estimate of E[x x^T], G = factor factor^T + diag(rest); and the importance of its outputs."""

    factor: Float[Tensor, "i r"]
    rest: Float[Tensor, " i"]
    """>= 0, like the factor float32 or better."""
    gradient: Float[Tensor, " o"] | None = None
    """Mean over samples of the sum over tokens of g^2, where g is the gradient of the log-likelihood of the model's own predictions with
    respect to the map's output; None where it was not computed."""

    @property
    def diagonal(self) -> Float[Tensor, " i"]:
        """diag(G)."""
        return self.factor.square().sum(1) + self.rest

    def dense(self) -> Float[Tensor, "i i"]:
        """G itself."""
        return self.factor @ self.factor.mT + torch.diag(self.rest)

    def to(self, device: torch.device) -> Moment:
        """The same on another device."""
        return Moment(self.factor.to(device), self.rest.to(device), None if self.gradient is None else self.gradient.to(device))

    def shrunk(self, offdiagonal: float, *, unit: bool = True) -> Moment:
        """G with its off-diagonal entries times `offdiagonal`, in float64; with `unit`, of mean diagonal 1, or the identity if G is 0."""
        factor, rest = self.factor.double(), self.rest.double()
        mean = float(self.diagonal.double().mean()) if unit else 1.0
        if mean == 0:
            return identity(len(rest), self.rest.device)
        return Moment(factor * (offdiagonal / mean) ** 0.5, (rest + (1 - offdiagonal) * factor.square().sum(1)) / mean)


def identity(size: int, device: torch.device | None = None) -> Moment:
    """The moment that prefers no direction, for inputs that nothing is known about."""
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return Moment(ones.new_zeros(size, 0), ones)


def compress(moment: Float[Tensor, "i i"], rank: int) -> Moment:
    """The leading `rank` eigenvectors of a moment, and a diagonal that keeps diag(G) as it is.

    >>> compress(torch.diag(torch.tensor([4.0, 1.0])), rank=1).dense()
    tensor([[4., 0.],
            [0., 1.]])
    """
    from scipy.linalg import eigh  # subtle: torch's own (divide and conquer) fails on some moments of low rank

    size, diagonal = len(moment), moment.diagonal().double()
    kept = min(rank, size)
    if not kept:
        return Moment(moment.new_zeros(size, 0, dtype=torch.float32), diagonal.float())
    values, vectors = map(torch.from_numpy, eigh(moment.double().numpy(), subset_by_index=[size - kept, size - 1]))
    factor = vectors * values.clamp(min=0).sqrt()
    rest = (diagonal - factor.square().sum(1)).clamp(min=0)
    return Moment(factor.float(), rest.float())


def least_squares(deltas: Factored, moments: Sequence[Moment], weights: Weights, *, ridge: float = 0.0) -> Dense:
    """The change that answers every expert's typical inputs as that expert would.    (o, i)

    argmin_D sum_q w_q tr((D - delta_q) G_q (D - delta_q)^T) + ridge |D|^2 = (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.

    deltas k of (o, i), G_q (i, i). With G_q = E_q[x x^T] each term is w_q E_q|D x - delta_q x|^2, over the inputs x of expert q.
    A moment is a low-rank factor and a diagonal, so the system is diag(d) + V V^T with V (i, k r). While k r < i, Woodbury's identity
    inverts it at a cost linear in i. Of a low-rank delta U L only the rows of L are solved for: U (L G_q (..)^-1). In float64, as moments.

    >>> see, hide = (Moment(torch.zeros(2, 0).double(), rest) for rest in torch.eye(2).double())
    >>> least_squares([torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])], [see, hide], [0.5, 0.5])
    tensor([[1., 2.]], dtype=torch.float64)
    """
    diagonal, factor = _system(moments, weights, ridge)
    ups, rows, whole = [], [], diagonal.new_zeros(deltas[0].shape)
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


def _system(moments: Sequence[Moment], weights: Weights, ridge: float) -> tuple[Tensor, Tensor]:
    """d (i,) and V (i, k r) of sum_q w_q G_q + ridge I = diag(d) + V V^T."""
    diagonal = sum((weight * moment.rest for moment, weight in zip(moments, weights, strict=True)), torch.zeros_like(moments[0].rest))
    return diagonal + ridge, torch.cat([weight**0.5 * moment.factor for moment, weight in zip(moments, weights, strict=True)], dim=1)


def condition_bound(moments: Sequence[Moment], weights: Weights, *, ridge: float) -> float:
    """An upper bound of the system's condition number, from eigenvalues in [min d, max d + |V|^2]: the solve can lose 1e-16 times this."""
    diagonal, factor = _system(moments, weights, ridge)
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
