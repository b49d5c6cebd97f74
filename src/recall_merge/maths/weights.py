"""From similarity to weights, layer by layer; and the ablations that tell whether the representations matter at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Outside = Literal["nearest", "uniform", "newest"]
Control = Literal["none", "uniform", "tilt", "ramp", "permuted"]


def softmax_weights(similarity: Tensor, *, temperature: float = 1.0) -> Tensor:
    """w_q^i = exp(S_q^i / tau) / sum_p exp(S_p^i / tau), each layer on its own.    (layers, n) -> (layers, n)

    RECALL, arXiv:2510.20479, as reconstructed. With S_N = 1 and tau = 1 the newest of n models has at most e / (e + n - 1).

    >>> softmax_weights(torch.tensor([[1.0, 1.0]]))
    tensor([[0.5000, 0.5000]])
    """
    return torch.softmax(similarity / temperature, dim=-1)


def outside_blocks(weights: Tensor, choice: Outside = "nearest") -> Tensor:
    """Weights of all layers, L + 2 of them, from those of 0..L.    (L + 1, n) -> (L + 2, n)

    nearest: the embedding has the weights of layer 0, final norm and head those of the last block; uniform: all models alike
    at both ends; newest: the newest model alone at both ends.
    """
    weights = torch.cat([weights, weights[-1:]])
    ends = torch.tensor([0, -1])
    if choice == "uniform":
        weights[ends] = 1.0 / weights.shape[1]
    elif choice == "newest":
        weights[ends] = torch.nn.functional.one_hot(torch.tensor(weights.shape[1] - 1), weights.shape[1]).to(weights.dtype)
    return weights


def ablation(weights: Tensor, kind: Control, *, seed: int = 0) -> Tensor:
    """Replace RECALL's weights by a ablation with the same shape.    (layers, n) -> (layers, n)

    uniform   every model alike;
    tilt      at every layer the newest has RECALL's own mean weight, the others share the rest;
    ramp      the newest's weight rises linearly with layer, with RECALL's own mean, from 1/n at layer 0;
    permuted  RECALL's rows, given to layers at random (`seed`).
    If a ablation does as well as the weights themselves, the representations do not matter.
    """
    layers, n = weights.shape
    if kind == "uniform":
        return torch.full_like(weights, 1.0 / n)
    if kind == "tilt":
        return _newest_at(weights[:, -1].mean().expand(layers), n)
    if kind == "ramp":
        rise = 2 * (weights[:, -1].mean() - 1.0 / n)
        return _newest_at(1.0 / n + rise * torch.linspace(0, 1, layers, dtype=weights.dtype), n)
    if kind == "permuted":
        return weights[torch.randperm(layers, generator=torch.Generator().manual_seed(seed))]
    return weights


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to 1.

    Raises:
        ValueError: if one is negative or not finite, or all are 0.
    """
    total = sum(weights)
    if not all(0 <= weight < float("inf") for weight in weights) or total <= 0:
        raise ValueError(f"weights must be finite, not negative, and not all 0: {list(weights)}")
    return [weight / total for weight in weights]


def along_blocks(points: Sequence[Sequence[float]], blocks: int) -> list[list[float]]:
    """Rows at every layer 0..L+1 from points that are spread evenly over the blocks, on straight lines between them.    p rows -> L + 2

    Block i of L lies at (i - 1) / (L - 1) of the way; a single block at its end. Layer 0 has the first block's row, L + 1 the last one's.

    >>> along_blocks([[0.0], [1.0]], 3)
    [[0.0], [0.0], [0.5], [1.0], [1.0]]
    """
    inside = [interpolated(points, (block / (blocks - 1)) if blocks > 1 else 1.0) for block in range(blocks)]
    return [inside[0], *inside, inside[-1]]


def interpolated(points: Sequence[Sequence[float]], t: float) -> list[float]:
    """The row at a share t of the way along the points, 0 <= t <= 1."""
    place = t * (len(points) - 1)
    first = int(place)
    after, share = points[min(len(points) - 1, first + 1)], place - first
    return [(1 - share) * low + share * high for low, high in zip(points[first], after, strict=True)]


def _newest_at(newest: Tensor, n: int) -> Tensor:
    """(layers,) -> (layers, n): the newest at the given weights, the others sharing the rest."""
    if n == 1:
        return newest.unsqueeze(1)
    others = ((1 - newest) / (n - 1)).unsqueeze(1).expand(-1, n - 1)
    return torch.cat([others, newest.unsqueeze(1)], dim=1)
