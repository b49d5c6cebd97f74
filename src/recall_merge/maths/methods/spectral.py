"""Methods on the singular vectors of the deltas: TSV, isotropic merging, null spaces, OPCM. Low-rank deltas stay low-rank until the sum.

They are made for the matrices of linear maps, base and deltas (o, i). Tensors of every other shape (norms, biases, stacked experts) and
embedding tables, whose rows are looked up, not mapped, get the weighted average, as in the TSV paper (OPCM: its own sum, as in its paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.deltas import Delta, Dense, Factored, LowRank, Weights, dense
from recall_merge.maths.low_rank import Singular, combined, norm, orthonormal, singular
from recall_merge.maths.methods.averages import linear
from recall_merge.maths.methods.registry import Scale, method

Rank = Annotated[int, Interval(ge=0), "singular vectors kept of each expert; 0: min(o, i) / k of an (o, i) matrix, or all if it has fewer"]
Common = Annotated[
    float, Interval(ge=0, le=1), "share of the directions taken from the sum of deltas; 1 is Iso-C, less Iso-CTS (paper: 0.8)"
]
Share = Annotated[
    float, Interval(ge=0, le=1), "share of the other experts' energy whose leading directions an expert keeps off; 0 is the plain sum"
]
Alpha = Annotated[
    float, Interval(ge=0, le=1), "share of the merged delta's spectrum (sum of singular values) that is kept clear of new deltas"
]
Growth = Annotated[
    Literal["norm", "sqrt"], "length of the merged delta: norm, the mean length of the deltas so far; sqrt, sum / sqrt(number)"
]


@method("tsv", source="Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081", factors=True, matrices=True, heavy=True)
def tsv(base: Dense, deltas: Factored, weights: Weights, *, rank: Rank = 0, scale: Scale = 1.0) -> Dense:
    """The top singular vectors of every delta, made orthogonal to each other, so that experts do not interfere.

    theta = theta_0 + scale * U' S V'^T,  S = diag(k w_1 S_1, .., k w_k S_k),  U' = polar([U_1 .. U_k]),  V' = polar([V_1 .. V_k]),
    with delta_q ~ U_q S_q V_q^T the top singular vectors and polar(U) = U (U^T U)^(-1/2).
    With uniform weights this is the paper's sum (TSV-Merge); experts of weight 0 or delta 0 are left out, as are singular values at
    rounding level. A direction that experts share exactly is taken once: k identical experts give the expert, if `rank` keeps all of it.
    """
    if base.ndim != 2:
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    present = _present(deltas, weights)
    if not present:
        return base.clone()
    count = rank or max(1, min(base.shape) // len(present))
    parts = [singular(delta).first(count) for delta, _ in present]
    values = torch.cat([part.values * factor for part, (_, factor) in zip(parts, present, strict=True)])
    return _added(base, parts, values, scale)


@method("isotropic", source="Marczak et al. 2025, No task left behind, arXiv:2502.04959", factors=True, matrices=True, heavy=True)
def isotropic(base: Dense, deltas: Factored, weights: Weights, *, common: Common = 1.0, scale: Scale = 1.0) -> Dense:
    """The sum of the deltas with all its singular values made equal, so that no expert's few strong directions drown the others'.

    theta = theta_0 + scale * s U V^T,  sum_q k w_q delta_q = U S V^T of rank r,  s = mean of S.
    That is Iso-C. With `common` c < 1, Iso-CTS: only the first n = int(c r) directions U_n, V_n are kept, and each expert adds the first
    (r - n) / k of what its k w_q delta_q - U_n U_n^T k w_q delta_q has; all are made orthogonal (polar), s is the mean of their values.
    r is the numerical rank (the paper: min(o, i)), so that empty directions, whose singular vectors are arbitrary, stay empty.
    """
    if base.ndim != 2:
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    present = _present(deltas, weights)
    if not present:
        return base.clone()
    whole = singular(combined([delta for delta, _ in present], [factor for _, factor in present]))
    size = len(whole.values)
    kept = int(common * size)
    parts = [whole.first(kept)]
    if kept < size:
        parts += [_outside(delta, factor, parts[0]).first((size - kept) // len(present)) for delta, factor in present]
    values = torch.cat([part.values for part in parts])
    if not len(values):
        return base.clone()
    return _added(base, parts, values.mean().expand(len(values)), scale)


@method("null_space", source="Qiu et al. 2025, NUFILT (its filter alone), arXiv:2509.21413", factors=True, matrices=True, heavy=True)
def null_space(base: Dense, deltas: Factored, weights: Weights, *, share: Share = 0.6, scale: Scale = 1.0) -> Dense:
    """The sum of the deltas, each kept off the inputs to which the others answer most differently from the base.

    theta = theta_0 + scale * sum_q k w_q delta_q (I - P_q),  P_q = V V^T,  V the fewest leading eigenvectors of
    H_q = sum_{p != q} delta_p^T delta_p / |delta_p|^2 whose eigenvalues make up `share` of their sum.
    Training changes a map along the inputs that it reads, so V stands for the inputs of the other tasks; what all experts do to inputs that
    they all have, which a sum would do k times, falls away. With uniform weights this is the sum; experts of weight 0 or delta 0 are
    left out. It is made for experts of different tasks: of two that learnt the same, each takes away what the other knows.
    """
    if base.ndim != 2:
        return linear(base, [dense(delta) for delta in deltas], weights, scale=scale)
    present = _present(deltas, weights)
    if not present:
        return base.clone()
    parts = [singular(delta) for delta, _ in present]
    answers = [part.right * (part.values / part.values.norm()) for part in parts]  # A A^T = delta^T delta / |delta|^2
    kept = [_off(delta, _leading(answers[:q] + answers[q + 1 :], share)) for q, (delta, _) in enumerate(present)]
    return dense(combined([base, *kept], [1.0, *(factor * scale for _, factor in present)]))


@method(
    "opcm", source="Tang et al. 2025, Merging models on the fly, arXiv:2501.09522", factors=True, matrices=True, ordered=True, heavy=True
)
def opcm(base: Dense, deltas: Factored, weights: Weights, *, alpha: Alpha = 0.5, growth: Growth = "norm", scale: Scale = 1.0) -> Dense:
    """One expert after another: each new delta is added outside the directions of the merged delta so far.

    D_1 = v_1,  D_t = (l_{t-1} D_{t-1} + P(v_t)) / l_t,  theta = theta_0 + scale * D_k,  v_t = k w_t delta_t.
    P(v) takes out of U^T v V (D_{t-1} = U S V^T) its diagonal and its first r x r block, r the number of leading singular values that
    make up at most `alpha` of their sum. l_1 = 1;  growth norm: l_t such that |D_t| = mean(|v_1| .. |v_t|);  sqrt: l_t = sqrt(t).
    The paper takes that norm over the whole model, we over the tensor. We leave alone the basis vectors of singular value 0, which are
    arbitrary. Where a tensor is no matrix, P(v) = v. Uniform weights: v_t = delta_t; experts of weight 0 or delta 0 are left out.
    """
    present = _present(deltas, weights)
    if not present:
        return base.clone()
    merged: Delta = combined([present[0][0]], [present[0][1]])
    length, so_far = 1.0, [norm(merged)]
    for step, (delta, factor) in enumerate(present[1:], start=2):
        so_far.append(norm(delta) * abs(factor))
        total = _opcm_step(merged, delta, factor, length, alpha) if base.ndim == 2 else combined([merged, delta], [length, factor])
        mean = sum(so_far) / step
        length = step**0.5 if growth == "sqrt" else (norm(total) / mean if mean else 1.0) or 1.0
        merged = combined([total], [1 / length])
    return dense(combined([base, merged], [1.0, scale]))


def _present(deltas: Factored, weights: Weights) -> list[tuple[Delta, float]]:
    """The deltas that count, each with k w_q: neither their weight nor the delta is 0."""
    pairs = [(delta, len(deltas) * weight) for delta, weight in zip(deltas, weights, strict=True)]
    return [(delta, factor) for delta, factor in pairs if factor and (isinstance(delta, LowRank) or delta.any())]


def _leading(factors: Sequence[Tensor], share: float) -> Tensor:
    """The fewest leading eigenvectors of sum_p A_p A_p^T, A_p (i, r_p), whose eigenvalues make up a share of their sum.    (i, n)"""
    if not factors or not share:
        return torch.empty(0, 0)
    vectors, values, _ = torch.linalg.svd(torch.cat(list(factors), dim=1), full_matrices=False)
    before = values.square().cumsum(0) - values.square()  # the energy of all that lead each of them
    return vectors[:, before < share * values.square().sum() * (1 - 1e-9)]


def _off(delta: Delta, directions: Tensor) -> Delta:
    """delta (I - V V^T), V (i, n)."""
    if not directions.numel():
        return delta
    if isinstance(delta, LowRank):
        down = delta.down.double()
        return LowRank(delta.up, (down - down @ directions @ directions.T).to(delta.down.dtype))
    directions = directions.to(delta.dtype)
    return delta - delta @ directions @ directions.T


def _opcm_step(merged: Delta, delta: Delta, factor: float, length: float, alpha: float) -> Delta:
    """length * merged + P(factor * delta)."""
    parts = singular(merged)
    shares = parts.values.cumsum(0) / parts.values.sum() if len(parts.values) else parts.values
    block = int((shares <= alpha).sum())
    if isinstance(delta, LowRank):
        dtype, inside = delta.up.dtype, (parts.left.T @ delta.up.double()) @ (delta.down.double() @ parts.right)
    else:
        dtype, inside = delta.dtype, parts.left.T @ delta.double() @ parts.right
    inside = inside * factor  # U^T v V
    taken = torch.diag(inside.diagonal())
    taken[:block, :block] = inside[:block, :block]
    correction = LowRank((-parts.left @ taken).to(dtype), parts.right.T.to(dtype))
    return combined([merged, delta, correction], [length, factor, 1.0])


def _outside(delta: Delta, factor: float, common: Singular) -> Singular:
    """Singular vectors of the part of v = factor * delta outside the common left directions, v - U U^T v, if it is more than rounding."""
    left, size = common.left, norm(delta) * abs(factor)
    if isinstance(delta, LowRank):
        up = delta.up.double() * factor
        return singular(LowRank(up - left @ (left.T @ up), delta.down), against=size)
    left = left.to(delta.dtype)
    return singular((delta - left @ (left.T @ delta)) * factor, against=size)


def _added(base: Dense, parts: Sequence[Singular], values: Tensor, scale: float) -> Tensor:
    """theta_0 + scale * polar([U_1 .. U_k]) diag(values) polar([V_1 .. V_k])^T."""
    up = orthonormal(torch.cat([part.left for part in parts], dim=1)) * values
    down = orthonormal(torch.cat([part.right for part in parts], dim=1)).T
    return torch.addmm(base, up.to(base.dtype), down.to(base.dtype), alpha=scale)
