"""Methods that compare the experts' deltas, entry by entry or by their angles: Model Stock, MagMax, SCE, PCB."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from recall_merge.maths.consensus import agreeing, weighted_sum
from recall_merge.maths.deltas import Deltas, Dense, Weights
from recall_merge.maths.methods.registry import Fraction, Scale, method
from recall_merge.maths.order_statistics import below, kth_largest
from recall_merge.maths.pieces import in_pieces, inner_products, pieces, rows

Filters = Annotated[Literal["whole", "rows"], "what has an angle of its own: the whole tensor, or each row (along its last axis)"]
Selected = Annotated[Fraction, "share of the entries that vary between experts which is merged, those of largest variance"]
Competing = Annotated[Fraction, "share of each delta's entries that stay, those of the highest score"]


@method("model_stock", source="Jang et al. 2024, Model Stock, arXiv:2403.19522")
def model_stock(base: Dense, deltas: Deltas, weights: Weights, *, vectors: Filters = "whole") -> Dense:
    """The average of the experts, drawn back to the base: the wider the angle between their deltas, the further.

    theta = theta_0 + t * sum_q w_q delta_q,  t = k c / (1 + (k - 1) c),  c = mean over pairs p < q of cos(delta_p, delta_q).
    One tensor at a time, as in the paper. Its average is uniform, ours has the run's weights. Opposed deltas (c < 0) give the base, t = 0;
    there the formula would extrapolate, and divide by 0 at c = -1 / (k - 1). A delta of 0 has c = 0 with all others; one expert has t = 1.
    """
    k = len(deltas)
    products = inner_products(deltas, vectors)  # (r, k, k)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    scales = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(scales > 0, products / scales.clamp(min=torch.finfo(scales.dtype).tiny), 0.0)
    first, second = torch.triu_indices(k, k, 1, device=products.device)
    c = cosines[:, first, second].mean(1).clamp(0, 1) if k > 1 else products.new_ones(len(products))
    t = k * c / (1 + (k - 1) * c)
    if vectors == "whole":
        return in_pieces(lambda piece, *parts: torch.add(piece, weighted_sum(parts, weights), alpha=float(t)), [base, *deltas])
    average = weighted_sum([rows(delta) for delta in deltas], weights)
    return base + average.mul_(t[:, None].to(base.dtype)).reshape(base.shape)


@method("magmax", source="Marczak et al. 2024, MagMax, arXiv:2407.06322", elementwise=True)
def magmax(base: Dense, deltas: Deltas, weights: Weights, *, scale: Scale = 1.0) -> Dense:
    """The delta of largest size, entry by entry.

    theta = theta_0 + scale * v_q*,  v_q = k w_q delta_q,  q* = argmax_q |v_q|.
    With uniform weights v_q = delta_q, the paper's rule. Of two entries of equal size and opposite sign the positive one is taken, so
    the order of the experts does not matter.
    """
    factors = [len(deltas) * weight for weight in weights]

    def largest(piece: Tensor, *parts: Tensor) -> Tensor:
        scaled = [part if factor == 1 else part * factor for part, factor in zip(parts, factors, strict=True)]
        high, low = reduce(torch.maximum, scaled), reduce(torch.minimum, scaled)
        positive = (high + low).sign_().add_(0.5).clamp_(0, 1).ceil_()  # 1 where high >= -low, else 0; torch.where takes twice as long
        return torch.add(piece, (high * positive).addcmul_(low, 1 - positive), alpha=scale)

    return in_pieces(largest, [base, *deltas])


@method("sce", source="Wan et al. 2024, FuseChat, arXiv:2408.07990", heavy=True)
def sce(base: Dense, deltas: Deltas, weights: Weights, *, density: Selected = 0.1, scale: Scale = 1.0) -> Dense:
    """Select the entries where experts differ, calculate each expert's weight from them, erase minority signs.

    theta = theta_0 + scale * sum_{q in A} eta_q delta_q / sum_{q in A} eta_q on the selected entries, theta_0 elsewhere, with
    eta_q ~ w_q * (sum of delta_q^2 over the selected entries),  A = {q : sign(delta_q) = sign(sum_p delta_p)}, + for an even vote.
    Selected is the share `density` of the entries whose variance over experts is not 0, the largest, with ties; or all, if every variance
    is 0 (one expert, or all alike). Uniform w_q give the paper's eta, which has none. Experts of weight 0 are left out.
    """
    present = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    if not present:
        return base.clone()
    changes = [delta for delta, _ in present]
    variance = in_pieces(_variance, changes)
    varying = int(torch.count_nonzero(variance))
    threshold = kth_largest(variance, max(1, int(density * varying))) if varying and density < 1 else 0.0

    def selected(variances: Tensor, *parts: Tensor) -> list[Tensor]:
        mask = hardshrink(variances, below(threshold, variance.dtype)).sign_() if threshold else torch.ones_like(variances)
        return [part * mask for part in parts]

    squares = [0.0] * len(changes)
    for parts in pieces(variance, *changes):
        squares = [square + float(part.square_().sum()) for square, part in zip(squares, selected(*parts), strict=True)]
    etas = [weight * square for (_, weight), square in zip(present, squares, strict=True)]
    total = sum(etas)
    if not total:
        return base.clone()
    etas = [eta / total for eta in etas]
    return in_pieces(
        lambda piece, *parts: torch.add(piece, agreeing(selected(*parts), etas, elect="unweighted"), alpha=scale),
        [base, variance, *changes],
    )


@method(
    "pcb",
    source="Du et al. 2024, Parameter competition balancing, arXiv:2410.02396, and its code, github.com/duguodong7/pcb-merging",
    heavy=True,
)
def pcb(base: Dense, deltas: Deltas, weights: Weights, *, density: Competing = 0.1, scale: Scale = 1.0) -> Dense:
    """Let the entries of each delta compete: within it by size, between experts by agreement; keep the winners, weighted by score.

    theta = theta_0 + scale * sum_q w_q s_q v_q / sum_q w_q s_q,  entry by entry, 0 / 0 = 0.
    v_q = delta_q with its size clamped between the int(n / 10000)-th smallest and largest of the tensor's n;
    score_q = exp(k norm(|v_q|)^2) tanh(delta_q sum_p delta_p);  s_q = norm(score_q, where below its (1 - density) quantile set to it),
    norm(x) = (x - min x) / (max x - min x) over the tensor, 1 where all are equal.
    This is the form of the authors' code; the paper's text has softmax for exp. The code always clamps at least one largest entry; we
    clamp none in a tensor of fewer than 10000 entries. Experts of weight 0 are left out; uniform weights give the paper's rule.
    """
    present = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    if not present or not base.numel():
        return base.clone()
    total = in_pieces(lambda *parts: weighted_sum(parts, [1.0] * len(parts)), [delta for delta, _ in present])
    numerator, divisor = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for delta, weight in present:
        beyond = delta.numel() // 10_000
        low, high = kth_largest(delta, delta.numel() - beyond, size=True), kth_largest(delta, 1 + beyond, size=True)
        score = in_pieces(lambda part, summed, low=low, high=high: _score(part, summed, low, high, len(present)), [delta, total])
        floor = kth_largest(score, max(1, delta.numel() - int(delta.numel() * (1 - density))))
        top = float(score.max())
        for part, scores, above, beneath in pieces(delta, score, numerator, divisor):
            share = _norm(scores.clamp_min_(floor), floor, top).mul_(weight)
            above.addcmul_(part.abs().clamp_(low, high).mul_(part.sign()), share)
            beneath.add_(share)
    return in_pieces(
        lambda piece, above, beneath: piece + scale * above / beneath.clamp_min_(torch.finfo(piece.dtype).tiny), [base, numerator, divisor]
    )


def _variance(*parts: Tensor) -> Tensor:
    """Variance over experts, entry by entry (divided by k); measured from the first of them, so that equal entries give exactly 0."""
    apart = [part - parts[0] for part in parts]
    mean = weighted_sum(apart, [1 / len(parts)] * len(parts))
    return weighted_sum([part.sub_(mean).square_() for part in apart], [1 / len(parts)] * len(parts))


def _score(part: Tensor, summed: Tensor, low: float, high: float, k: int) -> Tensor:
    # subtle: exp(k (x - 1)) for exp(k x), a factor that the next norm takes out again, so that many experts cannot overflow
    inside = _norm(part.abs().clamp_(low, high), low, high).square_().sub_(1).mul_(k).exp_()
    return inside.mul_((part * summed).tanh_())


def _norm(x: Tensor, low: float, high: float) -> Tensor:
    return x.sub(low).div_(high - low) if high > low else torch.ones_like(x)
