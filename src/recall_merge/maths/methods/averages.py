"""Weighted sums of deltas: the plain average and task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recall_merge.maths.methods.registry import method


@method("linear", source="Wortsman et al. 2022, Model soups, arXiv:2203.05482", elementwise=True)
def linear(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """Weighted average of the experts.

    theta = theta_0 + scale * sum_q w_q delta_q.    base (*s), deltas k of (*s) -> (*s)
    With weights that sum to 1 and scale 1 this is sum_q w_q theta_q, the model soup; the sum runs in the order of the experts.

    >>> import torch
    >>> linear(torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)], [0.5, 0.5])
    tensor([2., 2.])
    """
    merged = base.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta, alpha=scale * weight)
    return merged


@method("task_arithmetic", source="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089", elementwise=True)
def task_arithmetic(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """Sum of the experts' deltas: with uniform weights each counts in full, not 1/k of it.

    theta = theta_0 + scale * k * sum_q w_q delta_q.    base (*s), deltas k of (*s) -> (*s)
    Our weights sum to 1 (or less, where the base is in the pool); k times them is Ilharco's plain sum when they are uniform.

    >>> import torch
    >>> task_arithmetic(torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)], [0.5, 0.5])
    tensor([4., 4.])
    """
    return linear(base, deltas, weights, scale=scale * len(deltas))
