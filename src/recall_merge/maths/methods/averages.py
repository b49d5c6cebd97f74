"""Weighted sums of deltas: the plain average, task arithmetic and WiSE-FT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.registry import method


@method("linear", source="Wortsman et al. 2022, Model soups, arXiv:2203.05482", elementwise=True, sums=True)
def linear(
    base: Float[Tensor, "*s"], deltas: Sequence[Float[Tensor, "*s"]], weights: Sequence[float], *, scale: Scale = 1.0
) -> Float[Tensor, "*s"]:
    """Weighted average of the experts.

    theta = theta_0 + scale * sum_q w_q delta_q.
    With weights that sum to 1 and scale 1 this is sum_q w_q theta_q, the model soup. The sum runs in the order of the experts.

    >>> linear(torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)], [0.5, 0.5])
    tensor([2., 2.])
    """
    merged = torch.add(base, deltas[0], alpha=scale * weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=scale * weight)
    return merged


@method("task_arithmetic", source="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089", elementwise=True)
def task_arithmetic(
    base: Float[Tensor, "*s"], deltas: Sequence[Float[Tensor, "*s"]], weights: Sequence[float], *, scale: Scale = 1.0
) -> Float[Tensor, "*s"]:
    """Sum of the experts' deltas: with uniform weights each counts in full, not 1/k of it.

    theta = theta_0 + scale * k * sum_q w_q delta_q.
    Our weights sum to 1 (or less, where the base is in the pool); k times them is Ilharco's plain sum when they are uniform.

    >>> task_arithmetic(torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)], [0.5, 0.5])
    tensor([4., 4.])
    """
    return linear(base, deltas, weights, scale=scale * len(deltas))


@method(
    "wise_ft", source="Wortsman et al. 2022, Robust fine-tuning of zero-shot models, arXiv:2109.01903", elementwise=True, experts=(1, 1)
)
def wise_ft(
    base: Float[Tensor, "*s"],
    deltas: Sequence[Float[Tensor, "*s"]],
    weights: Sequence[float],
    *,
    alpha: Annotated[float, Interval(ge=0, le=1), "place on the line from the base (0) to the expert (1)"] = 0.5,
) -> Float[Tensor, "*s"]:
    """A point on the line between the base and its one expert.

    theta = (1 - alpha) theta_0 + alpha theta_1 = theta_0 + alpha * w_1 delta_1.
    The expert's weight w_1 is 1, unless the base is in the pool. For several experts, `linear` with a scale is the same line.

    >>> wise_ft(torch.zeros(2), [torch.ones(2)], [1.0], alpha=0.25)
    tensor([0.2500, 0.2500])
    """
    return linear(base, deltas, weights, scale=alpha)
