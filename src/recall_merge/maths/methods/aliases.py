"""Names from the literature for the plain weighted average with weights of a particular origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Alias:
    """`method: NAME` in a run is short for `method: METHOD` with `weights: {WEIGHTS: ...}`. It is no merge function of its own.

    Attributes:
        weights: where the weights come from: "recall", similarity of hidden states; "losses", losses on a few rows.
        doc: what it does, and the formulas of merge and weights, as `recall methods NAME` shows them.
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

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias("recall", weights="recall", source="RECALL, Wang et al. 2025, arXiv:2510.20479, as reconstructed", doc=_RECALL),
        Alias("lm_cocktail", weights="losses", source="Xiao et al. 2023, LM-Cocktail, arXiv:2311.13534", doc=_LM_COCKTAIL),
    )
}
