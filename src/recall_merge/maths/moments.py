"""Second moments of a linear layer's inputs, stored as a few directions and a diagonal: the content of input statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The inputs of a linear map, and the importance of its outputs.

    Attributes:
        factor: (i, r), and
        rest: (i,) >= 0, float32 or better: G = factor factor^T + diag(rest), an estimate of E[x x^T] over the inputs x.
        gradient: (o,) the mean over samples of the sum over tokens of g^2, where g is the gradient of the log-likelihood of the model's
            own predictions with respect to the map's output; None where it was not computed.
    """

    factor: Float[Tensor, "i r"]
    rest: Float[Tensor, " i"]
    gradient: Float[Tensor, " o"] | None = None

    @property
    def diagonal(self) -> Float[Tensor, " i"]:
        """diag(G)."""
        return self.factor.square().sum(1) + self.rest

    def dense(self) -> Float[Tensor, "i i"]:
        """G itself."""
        return self.factor @ self.factor.mT + torch.diag(self.rest)

    def shrunk(self, offdiagonal: float, *, unit: bool = True) -> Moment:
        """G with its off-diagonal entries times `offdiagonal`, in float64 and, with `unit`, scaled to a mean diagonal of 1.

        The moment of inputs that are all 0 cannot be scaled: with `unit` it becomes the identity.
        """
        factor, rest = self.factor.double(), self.rest.double()
        mean = float(self.diagonal.double().mean()) if unit else 1.0
        if mean == 0:
            return identity(len(rest))
        return Moment(factor * (offdiagonal / mean) ** 0.5, (rest + (1 - offdiagonal) * factor.square().sum(1)) / mean)


def identity(size: int) -> Moment:
    """The moment that prefers no direction, for inputs that nothing is known about."""
    return Moment(torch.zeros(size, 0, dtype=torch.float64), torch.ones(size, dtype=torch.float64))


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
