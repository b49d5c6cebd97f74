"""Methods that use the experts' input statistics, the moments G_q = E_q[x x^T]: Fisher averaging, RegMean, and our own `aligned`.

Tensors that are no linear maps, and those without any statistics, get the weighted average, theta_0 + scale * sum_q w_q delta_q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval

from recall_merge.maths.deltas import Deltas, Dense, Factored, Weights, dense
from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.registry import Scale, method
from recall_merge.maths.moments import Moment, condition_bound, identity, least_squares

Moments = Sequence[Moment | None]
Floor = Annotated[float, Interval(ge=0), "added to every information, as a share of the largest one of all experts"]
OffDiagonal = Annotated[
    float, Interval(ge=0, le=1), "off-diagonal entries of the moments are multiplied by this, RegMean's alpha; 0 uses their diagonals alone"
]
Ridge = Annotated[float, Interval(gt=0), "added to the diagonal of the moments' weighted mean, as a share of that diagonal's mean"]


@method("fisher", source="Matena and Raffel 2022, Fisher-weighted averaging, arXiv:2111.09832", matrices=True, gradients=True)
def fisher(base: Dense, deltas: Deltas, weights: Weights, *, moments: Moments = (), floor: Floor = 1e-6, scale: Scale = 1.0) -> Dense:
    """Average of the experts, each entry weighted by how much each expert's predictions depend on it.

    theta = theta_0 + scale * (sum_q w_q) * sum_q w_q F_q delta_q / sum_q w_q F_q.    base (o, i), k of (o, i), F_q (o, i)
    With scale 1 this is the paper's sum_q w_q F_q theta_q / sum_q w_q F_q (eq. 4). F_q >= 0 is the diagonal of expert q's Fisher
    information, E[(d log p(y | x) / d theta)^2] over its samples x and its own predictions y. The input statistics hold it as a product,
    as K-FAC does (Martens and Grosse 2015, arXiv:1503.05671): F_q[o, i] = E[sum g_o^2] E[x_i^2], g the gradient by the map's output.
    Every F_q is raised by `floor` times the largest of all, as the paper raises it by a small constant: an entry on which no prediction
    depends gets the weighted mean. So does a tensor for which an expert has no statistics.

    >>> know = Moment(torch.zeros(2, 0), torch.tensor([3.0, 1.0]), gradient=torch.ones(1))
    >>> other = Moment(torch.zeros(2, 0), torch.tensor([1.0, 1.0]), gradient=torch.ones(1))
    >>> fisher(torch.zeros(1, 2), [torch.ones(1, 2), -torch.ones(1, 2)], [0.5, 0.5], moments=[know, other], floor=0)
    tensor([[0.5000, 0.0000]])
    """
    gradients = [moment.gradient for moment in moments if moment is not None and moment.gradient is not None]
    if base.ndim != 2 or len(gradients) < len(deltas) or not any(weights):
        return linear(base, deltas, weights, scale=scale)
    inputs = [moment.diagonal for moment in moments if moment is not None]
    largest = max(float(gradient.max() * x2.max()) for gradient, x2 in zip(gradients, inputs, strict=True))
    least = floor * largest or 1.0  # nothing is known of any entry: the weighted mean
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight, gradient, x2 in zip(deltas, weights, gradients, inputs, strict=True):
        information = torch.outer(gradient, x2).to(base.dtype).add_(least if floor or not largest else 0.0).mul_(weight)
        total.addcmul_(delta, information)
        divisor.add_(information)
    return base + total.div_(divisor.clamp_(min=torch.finfo(base.dtype).tiny)).mul_(scale * sum(weights))


@method("regmean", source="Jin et al. 2023, Dataless knowledge fusion, arXiv:2212.09849", factors=True, matrices=True, heavy=True)
def regmean(
    base: Dense,
    deltas: Factored,
    weights: Weights,
    *,
    moments: Moments = (),
    offdiagonal: OffDiagonal = 0.9,
    ridge: Ridge = 1e-6,
    scale: Scale = 1.0,
) -> Dense:
    """The linear map that answers each expert's inputs as that expert does, in the least-squares sense.

    W = theta_0 + scale * (sum_q w_q delta_q (G_q + rho I)) (sum_q w_q (G_q + rho I))^-1.    base (o, i), k of (o, i), G_q (i, i)
    For rho -> 0 and scale 1 this is the paper's (sum G_q)^-1 sum G_q W_q (eq. 4), transposed, as our W maps from the right: W x.
    rho = `ridge` times the mean diagonal of sum_q w_q G_q: directions that no input has get the weighted mean of the deltas.
    The paper's moments are of full rank, ours a few directions and a diagonal. An expert without input statistics has the identity.

    >>> see, hide = Moment(torch.tensor([[1.0], [0.0]]), torch.zeros(2)), Moment(torch.tensor([[0.0], [1.0]]), torch.zeros(2))
    >>> one, two = torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])
    >>> regmean(torch.zeros(1, 2), [one, two], [0.5, 0.5], moments=[see, hide])
    tensor([[1.0000, 2.0000]])
    """
    if base.ndim != 2 or all(moment is None for moment in moments) or not any(weights):
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    total, shares = sum(weights), _shares(weights)
    shrunk = [identity(base.shape[1], base.device) if moment is None else moment.shrunk(offdiagonal, unit=False) for moment in moments]
    rho = ridge * sum(share * float(moment.diagonal.mean()) for moment, share in zip(shrunk, shares, strict=True))
    raised = [Moment(moment.factor, moment.rest + (rho or 1.0)) for moment in shrunk]  # without any input: the weighted mean
    return base + least_squares(deltas, raised, shares).mul_(scale * total).to(base.dtype)


@method("aligned", source="this project, after RegMean, Jin et al. 2023, arXiv:2212.09849", factors=True, matrices=True, heavy=True)
def aligned(
    base: Dense,
    deltas: Factored,
    weights: Weights,
    *,
    moments: Moments = (),
    offdiagonal: OffDiagonal = 0.9,
    ridge: Ridge = 1e-6,
    scale: Scale = 1.0,
) -> Dense:
    """RegMean around the base: least squares over the experts' typical inputs, none of which counts for more because it is larger.

    W = theta_0 + scale * (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.    base (o, i), k of (o, i), G_q (i, i)
    It minimises sum_q w_q E_q|W x - theta_q x|^2 + ridge |W - theta_0|^2: the average where the experts' inputs overlap, each expert's
    own change where they do not, the base's weights where there are no inputs. Three departures from `regmean`: each G_q is scaled to a
    mean diagonal of 1; the ridge pulls towards the base, not the mean of the experts; and the samples are a few typical ones. The ridge is
    so small since few inputs may dwarf the others. An expert without input statistics, or whose inputs are all 0, has the identity.
    """
    if base.ndim != 2 or all(moment is None for moment in moments) or not any(weights):
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    units = _units(moments, offdiagonal)
    return base + least_squares(deltas, units, _shares(weights), ridge=ridge).mul_(scale * sum(weights)).to(base.dtype)


def condition(moments: Moments, weights: Weights, *, offdiagonal: float = 0.9, ridge: float = 1e-6) -> float:
    """An upper bound of the condition number of the system that `aligned` solves for one tensor; at least one moment is known."""
    return condition_bound(_units(moments, offdiagonal), _shares(weights), ridge=ridge)


def _units(moments: Moments, offdiagonal: float) -> list[Moment]:
    """Moments with a mean diagonal of 1; the identity for an expert without input statistics."""
    rest = next(moment.rest for moment in moments if moment is not None)
    return [identity(len(rest), rest.device) if moment is None else moment.shrunk(offdiagonal) for moment in moments]


def _shares(weights: Weights) -> list[float]:
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]
