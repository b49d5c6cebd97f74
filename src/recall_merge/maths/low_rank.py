"""The best low-rank version of a change, and how much of the change it loses."""

from __future__ import annotations

import torch
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank


def truncated(delta: Delta, rank: int) -> LowRank:
    """The nearest matrix of a rank to a delta: its first singular directions.    (o, i) -> up (o, rank), down (rank, i), float64

    delta = U diag(s) V^T,  up = U_r diag(s_r)^(1/2),  down = diag(s_r)^(1/2) V_r^T: both factors are of the same size. By Eckart and Young
    1936, doi:10.1007/BF02288367, none of this rank is nearer in the Frobenius norm. A rank of min(o, i) or more gives the delta itself,
    to the rounding of float64. Factors (o, k), (k, i) cost O((o + i) k^2), a dense delta O(o i min(o, i)).

    >>> truncated(torch.diag(torch.tensor([4.0, 1.0])), 1).dense()
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


def lost(delta: Tensor, kept: LowRank) -> tuple[float, float]:
    """|delta - kept|^2 and |delta|^2, in float64, for relative errors over one tensor or many.    (o, i)

    >>> lost(torch.tensor([[3.0, 4.0]]), LowRank(torch.tensor([[1.0]]), torch.tensor([[3.0, 0.0]])))
    (16.0, 25.0)
    """
    delta = delta.double()
    difference = torch.addmm(delta, kept.up.double(), kept.down.double(), alpha=-1)
    return float(difference.square().sum()), float(delta.square().sum())
