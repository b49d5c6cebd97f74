"""Rows of the table that are the weighted average; what is special about them is where their weights come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.registry import method


@method("recall", source="RECALL, Wang et al. 2025, arXiv:2510.20479, as reconstructed", elementwise=True, sums=True)
def recall(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: Scale = 1.0) -> Tensor:
    """Average of the experts, weighted layer by layer by how alike they represent the newest task.

    theta^i = theta_0^i + scale * sum_q w_q^i delta_q^i.    base (*s), deltas k of (*s) -> (*s)

    The weights come first, from a few typical samples x of the newest expert's data (m of them, nearest to K-means centroids):
        S_q^i = (1/m) sum_x exp(-|h_q^i(x) - h_N^i(x)|^2 / (2 sigma_i^2)),    w_q^i = exp(S_q^i / tau) / sum_p exp(S_p^i / tau)
    with h_q^i(x) the pooled hidden state of model q after block i. There is no public code of the paper: every choice that it
    leaves open is an option with a name (see `RecallWeights`), and the scale on the merged delta is 1 as in the paper.
    """
    return linear(base, deltas, weights, scale=scale)


@method("lm_cocktail", source="Xiao et al. 2023, LM-Cocktail, arXiv:2311.13534", elementwise=True)
def lm_cocktail(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: Scale = 1.0) -> Tensor:
    """Average of the experts, each weighted by how well it does on a few rows of the newest task; one weight a model.

    theta = theta_0 + scale * sum_q w_q delta_q,    w_q = exp(-loss_q / T) / sum_p exp(-loss_p / T).    base (*s), deltas k of (*s) -> (*s)
    loss_q is expert q's mean negative log-likelihood of the answers of the newest expert's typical samples; T = 5 as in the paper, whose
    examples are any few of the task's.
    """
    return linear(base, deltas, weights, scale=scale)
