"""From similarity to weights and scales, layer by layer; and ablations that tell whether the representations matter at all.

Shapes: n models, newest last; layers 0..L (embedding and blocks), or 0..L + 1 with the final norm and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Outside = Literal["nearest", "uniform", "newest"]
Ablation = Literal["none", "uniform", "tilt", "ramp", "permuted"]


def softmax_weights(similarity: Float[Tensor, "layers n"], *, temperature: float = 1.0) -> Float[Tensor, "layers n"]:
    """w_q^i = exp(S_q^i / tau) / sum_p exp(S_p^i / tau), each layer on its own.

    RECALL, arXiv:2510.20479, as reconstructed. With S_N = 1 and tau = 1 the newest of n models has at most e / (e + n - 1).

    >>> softmax_weights(torch.tensor([[1.0, 1.0]]))
    tensor([[0.5000, 0.5000]])
    """
    weights = torch.softmax(similarity / temperature, dim=-1)
    if bool(weights.isnan().any()):  # tau so small that S / tau overflows: its limit, where the largest share all the weight
        largest = (similarity == similarity.amax(dim=-1, keepdim=True)).to(similarity.dtype)
        limit = largest / largest.sum(dim=-1, keepdim=True)
        return torch.where(weights.isnan(), limit, weights)
    return weights


def outside_blocks(weights: Float[Tensor, "layers n"], choice: Outside = "nearest") -> Float[Tensor, "layers+1 n"]:
    """Weights of layers 0..L + 1, from those of 0..L. `choice` sets the embedding's (0) and those of the final norm and head (L + 1).

    nearest: the embedding keeps its own weights, final norm and head have those of the last block. uniform: all models have the same
    weight at both ends. newest: the newest model has all the weight at both ends.
    """
    n = weights.shape[1]
    weights = torch.cat([weights, weights[-1:]])
    if choice == "uniform":
        weights[[0, -1]] = 1.0 / n
    elif choice == "newest":
        weights[[0, -1]] = torch.eye(n, dtype=weights.dtype)[-1]
    return weights


def ablate(weights: Float[Tensor, "layers n"], kind: Ablation, *, seed: int = 0) -> Float[Tensor, "layers n"]:
    """Weights that do not follow the representations, in place of RECALL's. Where they do as well, representations do not matter.

    uniform   all models have the same weight;
    tilt      at every layer the newest has the mean of its weights over the layers, the others share the rest;
    ramp      the newest's weight rises linearly from 1/n at layer 0, with the same mean; the others share the rest.
              Where that mean exceeds (1 + 1/n) / 2 (a small temperature), the last layers extrapolate: above 1 and below 0;
    permuted  RECALL's rows, assigned to layers at random (keyed by `seed`).
    """
    layers, n = weights.shape
    mean = weights[:, -1].mean()
    if kind == "uniform":
        return torch.full_like(weights, 1.0 / n)
    if kind == "tilt":
        return _with_newest(mean.expand(layers), n)
    if kind == "ramp":
        return _with_newest(1.0 / n + 2 * (mean - 1.0 / n) * torch.linspace(0, 1, layers, dtype=weights.dtype), n)
    if kind == "permuted":
        return weights[torch.randperm(layers, generator=torch.Generator().manual_seed(seed))]
    return weights


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to 1; refused if one is negative or not finite, or all are 0."""
    total = sum(weights)
    if not (all(weight >= 0 for weight in weights) and 0 < total < float("inf")):
        raise ValueError(f"weights must be finite, not negative, and not all 0: {list(weights)}")
    return [weight / total for weight in weights]


def along_blocks(points: Sequence[Sequence[float]], blocks: int) -> list[list[float]]:
    """Rows at layers 0..L + 1 from points spread evenly over the L blocks, with straight lines between them.    p rows -> L + 2 rows

    Block i lies at (i - 1) / (L - 1) of the way; a single block at its end. Layer 0 has the first block's row, L + 1 the last one's.

    >>> along_blocks([[0.0], [1.0]], 3)
    [[0.0], [0.0], [0.5], [1.0], [1.0]]
    """
    rows = [interpolated(points, (block / (blocks - 1)) if blocks > 1 else 1.0) for block in range(blocks)]
    return [rows[0], *rows, rows[-1]]


def interpolated(points: Sequence[Sequence[float]], t: float) -> list[float]:
    """The row at a share t of the way along the points, 0 <= t <= 1."""
    position = t * (len(points) - 1)
    before = int(position)
    after, share = min(len(points) - 1, before + 1), position - before
    return [(1 - share) * low + share * high for low, high in zip(points[before], points[after], strict=True)]


def lines_scales(blocks: int, *, alpha: float, beta: float) -> list[float]:
    """LiNeS, a scale on the merged delta at every layer 0..L+1: lambda_i = alpha + beta (i - 1) / (L - 1) for block i of L.

    Wang et al. 2024, LiNeS, arXiv:2410.17146, eq. 2. Layer 0 (embedding) has the first block's scale alpha, layer L + 1 (final norm and
    head) the last block's, alpha + beta; the authors' code gives alpha to both. A single block counts as the last.

    >>> lines_scales(3, alpha=0.5, beta=1.0)
    [0.5, 0.5, 1.0, 1.5, 1.5]
    """
    inside = [alpha + beta * ((block - 1) / (blocks - 1) if blocks > 1 else 1.0) for block in range(1, blocks + 1)]
    return [alpha, *inside, inside[-1] if inside else alpha + beta]


def _with_newest(newest: Float[Tensor, " layers"], n: int) -> Float[Tensor, "layers n"]:
    """Weights in which the newest has the given ones, and the others share the rest."""
    others = (1 - newest) / max(n - 1, 1)
    return torch.stack([others] * (n - 1) + [newest], dim=1)
