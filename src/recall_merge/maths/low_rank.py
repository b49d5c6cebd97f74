"""The best low-rank approximation of a delta, and how much of the delta it loses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank


def truncate(delta: Delta, rank: int) -> LowRank:
    """The nearest matrix of a given rank to a delta: its leading singular directions.    (o, i) -> up (o, rank), down (rank, i), float64

    delta = U diag(s) V^T,  up = U_r diag(s_r)^(1/2),  down = diag(s_r)^(1/2) V_r^T, so that both factors have the same norm. By Eckart
    and Young 1936, doi:10.1007/BF02288367, no matrix of this rank is nearer in the Frobenius norm. A rank of min(o, i) or more gives the
    delta itself, up to rounding. Cost: O((o + i) k^2) for factors (o, k), (k, i); O(o i min(o, i)) for a dense delta.

    >>> truncate(torch.diag(torch.tensor([4.0, 1.0])), 1).dense()
    tensor([[4., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    if isinstance(delta, LowRank):
        left, from_left = torch.linalg.qr(delta.up.double())
        right, from_right = torch.linalg.qr(delta.down.double().T)
        u, values, vt = torch.linalg.svd(from_left @ from_right.T, full_matrices=False)
        u, vt = left @ u, vt @ right.T
    else:
        u, values, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    roots = values[:rank].sqrt()
    return LowRank(u[:, :rank] * roots, roots.unsqueeze(1) * vt[:rank])


def squared_error(delta: Float[Tensor, "o i"], approximation: LowRank) -> tuple[float, float]:
    """|delta - approximation|_F^2 and |delta|_F^2, in float64: summed, they give relative errors over one tensor or many.

    >>> squared_error(torch.tensor([[3.0, 4.0]]), LowRank(torch.tensor([[1.0]]), torch.tensor([[3.0, 0.0]])))
    (16.0, 25.0)
    """
    delta = delta.double()
    difference = torch.addmm(delta, approximation.up.double(), approximation.down.double(), alpha=-1)
    return float(difference.square().sum()), float(delta.square().sum())
