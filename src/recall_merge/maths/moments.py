"""Second moments of a linear layer's inputs, kept small: a few directions and a diagonal. They are what input statistics holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """What went into a linear map, and what of its output mattered.

    Attributes:
        factor: (i, r), and
        rest: (i,) >= 0, float32 or better: G = factor factor^T + diag(rest), an estimate of E[x x^T] over the inputs x.
        gradient: (o,) the mean over samples of the sum over tokens of g^2, g the gradient of the log-likelihood of the model's own
            predictions by the map's output; None where it is not known.
    """

    factor: Tensor
    rest: Tensor
    gradient: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """diag(G), (i,)."""
        return self.factor.square().sum(1) + self.rest

    def dense(self) -> Tensor:
        """G itself, (i, i)."""
        return self.factor @ self.factor.mT + torch.diag(self.rest)

    def shrunk(self, offdiagonal: float, *, unit: bool = True) -> Moment:
        """G with its off-diagonal entries times `offdiagonal`, in float64 and, as `unit`, scaled to a mean diagonal of 1.

        A moment of inputs that are all 0 cannot be scaled: as `unit` it becomes the identity.
        """
        factor, rest = self.factor.double(), self.rest.double()
        mean = float(self.diagonal.double().mean()) if unit else 1.0
        if mean == 0:
            return identity(len(rest))
        return Moment(factor * (offdiagonal / mean) ** 0.5, (rest + (1 - offdiagonal) * factor.square().sum(1)) / mean)


def identity(size: int) -> Moment:
    """The moment of inputs of which nothing is known: all directions alike."""
    return Moment(torch.zeros(size, 0, dtype=torch.float64), torch.ones(size, dtype=torch.float64))


def compress(moment: Tensor, rank: int) -> Moment:
    """The leading `rank` eigenvectors of a moment, and a diagonal that keeps diag(G) as it is.    (i, i) -> Moment

    >>> compress(torch.diag(torch.tensor([4.0, 1.0])), rank=1).dense()
    tensor([[4., 0.],
            [0., 1.]])
    """
    from scipy.linalg import eigh  # subtle: torch's own (divide and conquer) fails on some moments of low rank

    size, diagonal = len(moment), moment.diagonal().double()
    kept = min(rank, size)
    if not kept:
        return Moment(moment.new_zeros(size, 0, dtype=torch.float32), diagonal.float())
    found = eigh(moment.double().numpy(), subset_by_index=[size - kept, size - 1])
    values, vectors = map(torch.from_numpy, found)
    factor = vectors * values.clamp(min=0).sqrt()
    rest = (diagonal - factor.square().sum(1)).clamp(min=0)
    return Moment(factor.float(), rest.float())
