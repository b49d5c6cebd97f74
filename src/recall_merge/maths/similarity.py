"""How similarly models represent the same samples at one layer: one decorated function per kernel, found by name in `KERNELS`.

RECALL as reconstructed (Wang et al. 2025, arXiv:2510.20479). Shapes: n models, the paper's M_1..M_N, newest last; m typical samples;
d the width. h[q, x] is the paper's h_q^i(x), the pooled hidden state of model q on sample x after layer i.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Bandwidth = Literal["median", "dimension"] | float
F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Kernel:
    """h (n, m, d) -> (n,), the similarity of every model to the newest; the function may take `bandwidth`."""

    name: str
    function: Callable[..., Tensor]
    source: str

    @property
    def has_bandwidth(self) -> bool:
        return "bandwidth" in inspect.signature(self.function).parameters

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


KERNELS: dict[str, Kernel] = {}


def kernel(name: str, *, source: str) -> Callable[[F], F]:
    """Register a kernel under `name`. A name is taken once; a second use is refused, naming both places."""

    def register(function: F) -> F:
        if name in KERNELS:
            first, second = (f"{f.__module__}.{f.__qualname__}" for f in (KERNELS[name].function, function))
            raise ValueError(f"kernel '{name}' is registered twice: {first} and {second}")
        KERNELS[name] = Kernel(name, function, source)
        return function

    return register


def similarity(h: Float[Tensor, "n m d"], *, kernel: str = "rbf", bandwidth: Bandwidth = "median") -> Float[Tensor, " n"]:
    """Similarity S_q of every model to the newest, at one layer, in float64. A kernel without a bandwidth ignores `bandwidth`.

    >>> similarity(torch.zeros(2, 3, 4))
    tensor([1., 1.], dtype=torch.float64)
    """
    row = KERNELS[kernel]
    return row.function(h.double(), **({"bandwidth": bandwidth} if row.has_bandwidth else {}))


@kernel("rbf", source="RECALL, Wang et al. 2025, arXiv:2510.20479, as reconstructed")
def rbf(h: Float[Tensor, "n m d"], bandwidth: Bandwidth = "median") -> Float[Tensor, " n"]:
    """S_q = (1/m) sum_x exp(-|h_q(x) - h_N(x)|^2 / (2 sigma^2)), in (0, 1]; S_N = 1.

    The paper leaves sigma open (`sigma_squared`). Where it is 0, the kernel is its limit: 1 at distance 0, else 0. So identical models have
    similarity 1, never NaN.

    >>> rbf(torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]]))  # all squared distances are 1, so sigma^2 = 1: exp(-1/2)
    tensor([0.6065, 1.0000])
    """
    squared, sigma2 = (h - h[-1]).square().sum(-1), sigma_squared(h, bandwidth)  # (n, m), ()
    values = torch.exp(-squared / (2 * sigma2)) if sigma2 > 0 else (squared == 0).to(h.dtype)
    return values.mean(-1)


def sigma_squared(h: Float[Tensor, "n m d"], bandwidth: Bandwidth) -> Float[Tensor, ""]:
    """sigma^2 of one layer, by one of three rules. With the median, similarity does not fall just because hidden states grow with depth.

    median     the median of |h_p(x) - h_q(x)|^2 over all pairs of different models p < q and all samples x;
    dimension  d / 2, that is gamma = 1 / (2 sigma^2) = 1 / d;
    a number   sigma itself, in the units of h.
    """
    if bandwidth == "median":
        pairs = [(p - q).square().sum(-1) for p, q in combinations(h, 2)]
        return torch.cat(pairs).quantile(0.5) if pairs else h.new_zeros(())  # the usual median: mean of the middle two
    return h.new_tensor(h.shape[-1] / 2 if bandwidth == "dimension" else float(bandwidth) ** 2)


@kernel("cka", source="Kornblith et al. 2019, arXiv:1905.00414, eq. 6")
def cka(h: Float[Tensor, "n m d"]) -> Float[Tensor, " n"]:
    """Linear centred kernel alignment: |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), in [0, 1].

    X, Y (m, d) are the samples of model q and of the newest, centred. CKA ignores rotations and scale. Where all samples of a model
    coincide, its centred norm is 0: two such models have similarity 1, such a model and another 0.

    >>> h = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> cka(torch.stack([2 * h[0], h[1], h[0]]))[0].round(decimals=6)
    tensor(1., dtype=torch.float64)
    """
    centred = h - h.mean(1, keepdim=True)
    grams = centred @ centred.mT  # (n, m, m): |Y^T X|_F^2 = <XX^T, YY^T>
    return _cosine_to_newest((grams * grams[-1]).sum((1, 2)), grams.square().sum((1, 2)).sqrt())


@kernel("cosine", source="the mean over samples is ours")
def cosine(h: Float[Tensor, "n m d"]) -> Float[Tensor, " n"]:
    """Mean over samples of the cosine between h_q(x) and h_N(x), in [-1, 1].

    Two zero vectors have similarity 1, a zero and a non-zero vector 0.

    >>> cosine(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]))
    tensor([0.7071, 1.0000])
    """
    return _cosine_to_newest((h * h[-1]).sum(-1), h.norm(dim=-1)).mean(-1)


def _cosine_to_newest(products: Float[Tensor, "n ..."], norms: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """<a_q, a_N> / (|a_q| |a_N|); 1 where both norms are 0, and 0 where one of them is."""
    both = norms * norms[-1]
    return torch.where(both > 0, products / both, (norms == norms[-1]).to(both.dtype))
