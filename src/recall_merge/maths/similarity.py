"""How alike models represent the same samples at one layer: one small function a kernel, in `KERNELS`.

RECALL as reconstructed (Wang et al. 2025, arXiv:2510.20479). Our n models are the paper's M_1..M_N, the last one the newest M_N; our
`layer` is its i; h[q, x] its h_q^i(x), the pooled hidden state of model q on typical sample x.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

Bandwidth = Literal["median", "dimension"] | float


def similarity(h: Tensor, *, kernel: str = "rbf", bandwidth: Bandwidth = "median") -> Tensor:
    """Similarity of every model to the newest, at one layer.    h (n, m, d), newest last -> (n,) in (0, 1] for rbf; S_N = 1.

    Computed in float64, whatever the dtype of h.

    >>> similarity(torch.zeros(2, 3, 4))
    tensor([1., 1.], dtype=torch.float64)
    """
    h = h.double()
    if kernel == "rbf":
        return rbf(h, bandwidth)
    return KERNELS[kernel](h)


def rbf(h: Tensor, bandwidth: Bandwidth = "median") -> Tensor:
    """S_q = (1/m) sum_x exp(-|h_q(x) - h_N(x)|^2 / (2 sigma^2)).    h (n, m, d) -> (n,)

    sigma^2 is, by `bandwidth`:
      median     the median of |h_p(x) - h_q(x)|^2 over all pairs of different models p < q and all samples x;
      dimension  d / 2, that is gamma = 1 / (2 sigma^2) = 1 / d;
      a number   sigma itself, in the units of h.
    The paper leaves it open; the median keeps the profile over layer from following the growth of hidden norms.
    Where sigma is 0 the kernel is its own limit: 1 at distance 0, else 0. So identical models have similarity 1, never NaN.

    >>> rbf(torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]]))  # all squared distances are 1, so sigma^2 = 1: exp(-1/2)
    tensor([0.6065, 1.0000])
    """
    squared = (h - h[-1]).square().sum(-1)  # (n, m)
    if bandwidth == "median":
        sigma2 = _median_squared_distance(h)
    elif bandwidth == "dimension":
        sigma2 = torch.tensor(h.shape[-1] / 2, dtype=h.dtype)
    else:
        sigma2 = torch.tensor(float(bandwidth) ** 2, dtype=h.dtype)
    values = torch.exp(-squared / (2 * sigma2)) if sigma2 > 0 else (squared == 0).to(h.dtype)
    return values.mean(-1)


def cka(h: Tensor) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414, eq. 6): |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F).

    h (n, m, d) -> (n,) in [0, 1]; X, Y are the models' samples, centred. It ignores rotations and scale. Two models whose
    samples all coincide (centred norm 0) are alike only if both are so: 1, else 0.

    >>> h = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> cka(torch.stack([2 * h[0], h[1], h[0]]))[0].round(decimals=6)
    tensor(1., dtype=torch.float64)
    """
    centred = h - h.mean(1, keepdim=True)
    grams = centred @ centred.mT  # (n, m, m): |Y^T X|_F^2 = <XX^T, YY^T>
    cross = (grams * grams[-1]).sum((1, 2))
    norms = grams.square().sum((1, 2)).sqrt()
    both = norms * norms[-1]
    return torch.where(both > 0, cross / both.clamp(min=torch.finfo(h.dtype).tiny), (norms == norms[-1]).to(h.dtype))


def cosine(h: Tensor) -> Tensor:
    """Mean over samples of the cosine between h_q(x) and h_N(x).    h (n, m, d) -> (n,) in [-1, 1]

    Two zero vectors are alike (1); a zero and a non-zero vector are not (0).

    >>> cosine(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]))
    tensor([0.7071, 1.0000])
    """
    norms = h.norm(dim=-1)
    both = norms * norms[-1]
    dots = (h * h[-1]).sum(-1)
    similarity_rows = torch.where(both > 0, dots / both.clamp(min=torch.finfo(h.dtype).tiny), (norms == norms[-1]).to(h.dtype))
    return similarity_rows.mean(-1)


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"rbf": rbf, "cka": cka, "cosine": cosine}


def _median_squared_distance(h: Tensor) -> Tensor:
    pairs = [(h[p] - h[q]).square().sum(-1) for p, q in combinations(range(len(h)), 2)]
    return torch.cat(pairs).quantile(0.5) if pairs else h.new_zeros(())  # the usual median: mean of the middle two
