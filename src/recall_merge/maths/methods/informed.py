"""Fisher and RegMean: methods that need statistics of the experts' data, which their statistics hold; and LM-Cocktail's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.deltas import Delta, LowRank, dense
from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.consensus import weighted_sum
from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.registry import method
from recall_merge.maths.moments import Moment, identity

Floor = Annotated[float, Interval(ge=0), "added to every information, as a share of the largest one of all experts"]
OffDiagonal = Annotated[float, Interval(ge=0, le=1), "off-diagonal entries of the moments are multiplied by this, the paper's alpha"]
Ridge = Annotated[float, Interval(gt=0), "added to the sum of moments, as a share of its mean diagonal"]


@method("fisher", source="Matena and Raffel 2022, Fisher-weighted averaging, arXiv:2111.09832", matrices=True)
def fisher(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment | None] = (),
    floor: Floor = 1e-6,
    scale: Scale = 1.0,
) -> Tensor:
    """Average of the experts, entry by entry by how much each expert's predictions depend on the entry.

    theta = theta_0 + scale * sum_q w_q F_q delta_q / sum_q w_q F_q.    base (o, i), k of (o, i), F_q (o, i) -> (o, i)
    With scale 1 this is the paper's sum_q w_q F_q theta_q / sum_q w_q F_q (eq. 4). F_q >= 0 is the diagonal of expert q's Fisher
    information, E[(d log p(y | x) / d theta)^2] over its samples x and its own predictions y. input statistics keeps it as a product, as K-FAC does
    (Martens and Grosse 2015, arXiv:1503.05671): F_q[o, i] = E[sum g_o^2] E[x_i^2], g the gradient by the map's output. Every F_q is raised
    by `floor` times the largest value of all of them, as the paper raises it by a small constant: where no expert's predictions depend on
    an entry, it gets the plain weighted mean. So do tensors that are no linear maps, and those that not every expert's statistics tells of.

    >>> know = Moment(torch.zeros(2, 0), torch.tensor([3.0, 1.0]), gradient=torch.ones(1))
    >>> other = Moment(torch.zeros(2, 0), torch.tensor([1.0, 1.0]), gradient=torch.ones(1))
    >>> fisher(torch.zeros(1, 2), [torch.ones(1, 2), -torch.ones(1, 2)], [0.5, 0.5], moments=[know, other], floor=0)
    tensor([[0.5000, 0.0000]])
    """
    gradients = [moment.gradient for moment in moments if moment is not None and moment.gradient is not None]
    if base.ndim != 2 or len(gradients) < len(deltas) or not any(weights):
        return linear(base, deltas, weights, scale=scale)
    inputs = [moment.diagonal for moment in moments if moment is not None]
    largest = max(float(outputs.max() * reads.max()) for outputs, reads in zip(gradients, inputs, strict=True))
    least = floor * largest or 1.0  # nothing is known of any entry: the plain mean
    above, below = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight, outputs, reads in zip(deltas, weights, gradients, inputs, strict=True):
        share = torch.outer(outputs, reads).to(base.dtype).add_(least if floor or not largest else 0.0).mul_(weight)
        above.addcmul_(delta, share)
        below.add_(share)
    return base + above.div_(below.clamp_(min=torch.finfo(base.dtype).tiny)).mul_(scale * sum(weights))


@method("regmean", source="Jin et al. 2023, Dataless knowledge fusion, arXiv:2212.09849", factors=True, matrices=True)
def regmean(
    base: Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment | None] = (),
    offdiagonal: OffDiagonal = 0.9,
    ridge: Ridge = 1e-6,
    scale: Scale = 1.0,
) -> Tensor:
    """The linear map that answers each expert's inputs as that expert does, in the least-squares sense.

    W = theta_0 + scale * (sum_q w_q delta_q G_q + rho mean_q delta_q) (sum_q w_q G_q + rho I)^-1.    base (o, i), k of (o, i) -> (o, i)
    G_q (i, i) = E[x x^T] over the layer's inputs under expert q, from its statistics, with off-diagonal entries times `offdiagonal`. For
    rho -> 0 and scale 1 this is the paper's (sum G_q)^-1 sum G_q W_q (eq. 4), transposed, as our W maps from the right: W x.
    rho = `ridge` times the mean diagonal of sum_q w_q G_q: directions that no input has get the weighted mean of the deltas.
    The moments are input statistics's, cut to a few directions and a diagonal; the paper's are of full rank. An expert without input statistics has the
    identity as its moment. Tensors that are no linear maps get theta_0 + scale * sum_q w_q delta_q. Solved in float64.

    >>> see, hide = Moment(torch.tensor([[1.0], [0.0]]), torch.zeros(2)), Moment(torch.tensor([[0.0], [1.0]]), torch.zeros(2))
    >>> one, two = torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])
    >>> regmean(torch.zeros(1, 2), [one, two], [0.5, 0.5], moments=[see, hide])
    tensor([[1.0000, 2.0000]])
    """
    if base.ndim != 2 or all(moment is None for moment in moments) or not any(weights):
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    width = base.shape[1]
    seen, moment = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for delta, weight, own in zip(deltas, weights, moments, strict=True):
        known = identity(width) if own is None else own
        shrunk = known.factor.double() @ known.factor.double().mT * offdiagonal
        shrunk.diagonal().copy_(known.diagonal)
        if isinstance(delta, LowRank):
            seen.addmm_(delta.up.double(), delta.down.double() @ shrunk, alpha=weight)
        else:
            seen.addmm_(delta.double(), shrunk, alpha=weight)
        moment.add_(shrunk, alpha=weight)
    total = sum(weights)
    rho = ridge * float(moment.diagonal().mean()) or 1.0  # without any input: the weighted mean
    mean = weighted_sum([dense(delta).double() for delta in deltas], [weight / total for weight in weights])
    moment.diagonal().add_(rho)
    change = torch.linalg.solve(moment, seen.add_(mean, alpha=rho), left=False)
    return base + change.mul_(scale * total).to(base.dtype)


def cocktail_weights(losses: Sequence[float], *, temperature: float = 5.0) -> list[float]:
    """w_q = exp(-loss_q / T) / sum_p exp(-loss_p / T): one weight a model, from its mean loss on a few labelled rows of the new task.

    Xiao et al. 2023, LM-Cocktail, arXiv:2311.13534, T = 5.

    >>> cocktail_weights([2.0, 2.0])
    [0.5, 0.5]
    """
    return torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0).tolist()
