"""Weighted sums of deltas, and the literature's names for the plain average with weights of a particular origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from recall_merge.maths.deltas import Deltas, Dense, Weights
from recall_merge.maths.methods.registry import Scale, method

Position = Annotated[float, Interval(ge=0, le=1), "place on the line from the base (0) to the expert (1)"]


@method("linear", source="Wortsman et al. 2022, Model soups, arXiv:2203.05482", elementwise=True, sums=True)
def linear(base: Dense, deltas: Deltas, weights: Weights, *, scale: Scale = 1.0) -> Dense:
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
def task_arithmetic(base: Dense, deltas: Deltas, weights: Weights, *, scale: Scale = 1.0) -> Dense:
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
def wise_ft(base: Dense, deltas: Deltas, weights: Weights, *, alpha: Position = 0.5) -> Dense:
    """A point on the line between the base and its one expert.

    theta = (1 - alpha) theta_0 + alpha theta_1 = theta_0 + alpha * w_1 delta_1.
    The expert's weight w_1 is 1, unless the base is in the pool. For several experts, `linear` with a scale is the same line.

    >>> wise_ft(torch.zeros(2), [torch.ones(2)], [1.0], alpha=0.25)
    tensor([0.2500, 0.2500])
    """
    return linear(base, deltas, weights, scale=alpha)


@dataclass(frozen=True)
class Alias:
    """`method: NAME` in a run is short for `method: METHOD` with `weights: {WEIGHTS: ...}`. It is no merge function of its own.

    Its weights come from the similarity of hidden states ("recall") or the losses on a few rows ("losses"); its doc is what
    `recall methods NAME` shows.
    """

    name: str
    weights: Literal["recall", "losses"]
    source: str
    doc: str
    method: str = "linear"


_RECALL = """Average of the experts, weighted layer by layer by how similarly they represent the newest task.

theta^i = theta_0^i + scale * sum_q w_q^i delta_q^i.    layer i, expert q, newest expert N
The weights come first, from m typical samples x of the newest expert's data, the rows nearest to K-means centroids:
    S_q^i = (1/m) sum_x exp(-|h_q^i(x) - h_N^i(x)|^2 / (2 sigma_i^2)),    w_q^i = exp(S_q^i / tau) / sum_p exp(S_p^i / tau)
with h_q^i(x) the pooled hidden state of model q after layer i. The paper has no public code: every choice that it leaves open
is an option with a name, and the scale on the merged delta is 1, as in the paper."""

_LM_COCKTAIL = """Average of the experts, each weighted by how well it does on a few rows of the newest task; one weight per model.

theta = theta_0 + scale * sum_q w_q delta_q,    w_q = exp(-loss_q / T) / sum_p exp(-loss_p / T).
loss_q is expert q's mean negative log-likelihood of the answers to the newest expert's typical samples; T = 5, as in the paper, which
takes any few examples of the task."""

ALIASES = {
    "recall": Alias("recall", "recall", "RECALL, Wang et al. 2025, arXiv:2510.20479, as reconstructed", _RECALL),
    "lm_cocktail": Alias("lm_cocktail", "losses", "Xiao et al. 2023, LM-Cocktail, arXiv:2311.13534", _LM_COCKTAIL),
}
