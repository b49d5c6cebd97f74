"""What an expert changed in one tensor: dense, or as two low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """delta = up @ down, of rank r at most; float32 or better.

    An adapter's delta (alpha / r) B A, with the scale folded into `up` (Hu et al. 2022, arXiv:2106.09685, section 4.1).
    """

    up: Float[Tensor, "o r"]
    down: Float[Tensor, "r i"]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def to(self, device: torch.device) -> LowRank:
        """The same on another device."""
        return LowRank(self.up.to(device), self.down.to(device))

    def dense(self) -> Float[Tensor, "o i"]:
        """The delta as one tensor."""
        return self.up @ self.down


Dense = Float[Tensor, "*s"]
"""A tensor of any shape; within one call the same shape for all."""
Delta = Dense | LowRank
Deltas = Sequence[Dense]
"""One per expert, in the run's order, dense."""
Factored = Sequence[Delta]
"""The same, as factors where an expert has them."""
Weights = Sequence[float]
"""One per delta, for the tensor's layer."""


def dense(delta: Delta) -> Dense:
    """A delta as one tensor, whichever form it has."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def squared(delta: Delta) -> float:
    """The sum of a delta's squared entries; infinite beyond float32. Factors are not multiplied out: |U D|^2 = tr(U'U D D').

    >>> squared(LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0]])))
    45.0
    """
    if isinstance(delta, LowRank):
        return float(((delta.up.mT @ delta.up) * (delta.down @ delta.down.mT)).sum())
    flat = delta.reshape(-1)
    return float(torch.dot(flat, flat))
