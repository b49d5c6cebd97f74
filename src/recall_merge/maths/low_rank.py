"""Low-rank forms of deltas: singular vectors, sums and approximations. A low-rank delta is never made dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Delta, Factored, LowRank, dense

_SHARED = 1e-3  # vectors that differ by less than about this, relative to their length, count as one direction


class Singular(NamedTuple):
    """delta = left @ diag(values) @ right.T, in float64; values fall and are above 0."""

    left: Float[Tensor, "o r"]
    values: Float[Tensor, " r"]
    right: Float[Tensor, "i r"]

    def first(self, count: int) -> Singular:
        return Singular(self.left[:, :count], self.values[:count], self.right[:, :count])


def singular(delta: Delta, *, against: float | None = None) -> Singular:
    """The singular value decomposition of a delta, cut at its numerical rank.

    Values up to max(o, i) * 1.2e-7 (float32's epsilon) times `against`, by default the largest, are rounding, and their vectors arbitrary.
    They are left out, so a dense delta of low rank gives what its factors give.

    >>> singular(LowRank(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))).values.tolist()
    [10.0]
    """
    parts = _decomposed(delta)
    if against is None:
        against = float(parts.values[0]) if len(parts.values) else 0.0
    rank = int((parts.values > max(delta.shape) * torch.finfo(torch.float32).eps * against).sum())
    return parts.first(rank)


def _decomposed(delta: Delta) -> Singular:
    """All singular vectors. Factors (o, r), (r, i) cost O((o + i) r^2), a dense delta O(o i min(o, i))."""
    if not isinstance(delta, LowRank):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return Singular(left.double(), values.double(), right.double().T)
    left, from_left = torch.linalg.qr(delta.up.double())
    right, from_right = torch.linalg.qr(delta.down.double().T)
    u, values, vt = torch.linalg.svd(from_left @ from_right.T, full_matrices=False)
    return Singular(left @ u, values, right @ vt.T)


def combined(deltas: Factored, factors: Sequence[float]) -> Delta:
    """sum_q c_q delta_q: factors side by side if all are low-rank, else dense.

    >>> one = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    >>> combined([one, one], [1.0, 2.0]).rank
    2
    """
    if all(isinstance(delta, LowRank) for delta in deltas):
        low = [delta for delta in deltas if isinstance(delta, LowRank)]
        up = torch.cat([delta.up * factor for delta, factor in zip(low, factors, strict=True)], dim=1)
        return LowRank(up, torch.cat([delta.down for delta in low]))
    total = dense(deltas[0]) * factors[0]
    for delta, factor in zip(deltas[1:], factors[1:], strict=True):
        if isinstance(delta, LowRank):
            total.addmm_(delta.up.to(total.dtype), delta.down.to(total.dtype), alpha=factor)
        else:
            total.add_(delta, alpha=factor)
    return total


def norm(delta: Delta) -> float:
    """Frobenius norm; of factors by |up down|^2 = <up^T up, down down^T>.

    >>> norm(LowRank(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])))
    10.0
    """
    if isinstance(delta, LowRank):
        up, down = delta.up.double(), delta.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))


def orthonormal(vectors: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The nearest orthonormal columns, V (V^T V)^(-1/2), in float64.

    The polar factor of V, P Q^T with V = P D Q^T: the orthogonal Procrustes solution, whatever the order of the columns. Where they depend
    on each other (values of D below 1e-3 of the largest) those directions are left out: equal columns share one direction.

    >>> orthonormal(torch.tensor([[2.0, 2.0], [0.0, 0.0]])).round(decimals=4)
    tensor([[0.7071, 0.7071],
            [0.0000, 0.0000]], dtype=torch.float64)
    """
    vectors = vectors.double()
    if not vectors.shape[1]:
        return vectors
    values, turn = torch.linalg.eigh(vectors.T @ vectors)  # = D^2, Q
    held = values > _SHARED**2 * values[-1]
    return vectors @ (turn[:, held] * values[held].rsqrt()) @ turn[:, held].T


def truncate(delta: Delta, rank: int) -> LowRank:
    """The nearest matrix of a given rank to a delta: its leading singular directions.    (o, i) -> up (o, rank), down (rank, i), float64

    delta = U diag(s) V^T,  up = U_r diag(s_r)^(1/2),  down = diag(s_r)^(1/2) V_r^T, so that both factors have the same norm. By Eckart
    and Young 1936, doi:10.1007/BF02288367, no matrix of this rank is nearer in the Frobenius norm.

    >>> truncate(torch.diag(torch.tensor([4.0, 1.0])), 1).dense()
    tensor([[4., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    parts = _decomposed(delta if isinstance(delta, LowRank) else delta.double()).first(rank)
    roots = parts.values.sqrt()
    return LowRank(parts.left * roots, (parts.right * roots).T.contiguous())


def squared_error(delta: Float[Tensor, "o i"], approximation: LowRank) -> tuple[float, float]:
    """|delta - approximation|_F^2 and |delta|_F^2, in float64: summed, they give relative errors over one tensor or many.

    >>> squared_error(torch.tensor([[3.0, 4.0]]), LowRank(torch.tensor([[1.0]]), torch.tensor([[3.0, 0.0]])))
    (16.0, 25.0)
    """
    delta = delta.double()
    difference = torch.addmm(delta, approximation.up.double(), approximation.down.double(), alpha=-1)
    return float(difference.square().sum()), float(delta.square().sum())
