"""Interpolation on a sphere: SLERP, NuSLERP and the Karcher mean.

A point between vectors on a sphere is a weighted sum of them. Each method finds the coefficients from the k x k matrix of inner products
alone, in float64, and forms the weighted sum: two passes over the tensors, however many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.consensus import weighted_sum
from recall_merge.maths.deltas import Deltas, Dense, Weights
from recall_merge.maths.methods.registry import method
from recall_merge.maths.pieces import Vectors, columns_last, in_pieces, inner_products, rows

Sphere = Annotated[Literal["weights", "deltas"], "which vectors lie on the sphere: the experts' weights or their deltas"]
Above = Annotated[float, Interval(ge=0, le=1), "vectors with a cosine of more than this, in size, are interpolated on the straight line"]


@method("slerp", source="Shoemake 1985, Animating rotation with quaternion curves, doi:10.1145/325165.325242", experts=(2, 2))
def slerp(
    base: Dense, deltas: Deltas, weights: Weights, *, vectors: Vectors = "whole", sphere: Sphere = "weights", linear_above: Above = 0.9995
) -> Dense:
    """Spherical interpolation between two experts' weights.

    theta = (sin((1 - t) a) theta_1 + sin(t a) theta_2) / sin a,  cos a = <theta_1, theta_2> / (|theta_1| |theta_2|),
    t = w_2 / (w_1 + w_2).
    Where the vectors are nearly parallel or opposite, or one is 0, the point on the straight line, (1 - t) theta_1 + t theta_2, is taken:
    for fine-tunes of one base SLERP of the weights is the linear average in all but name. Lengths and the threshold of 0.9995 are as in
    mergekit 0.1.5. Only the ratio of the weights matters; w = 0, 0 counts as equal.
    """
    products = _products(base, deltas, vectors, sphere)
    return _combine(base, deltas, _arc(products, _shares(weights, products)[1], linear_above), vectors, sphere)


@method("nuslerp", source="Goddard 2024, mergekit's NuSLERP, github.com/arcee-ai/mergekit docs/merge_methods.md", experts=(2, 2))
def nuslerp(
    base: Dense, deltas: Deltas, weights: Weights, *, vectors: Vectors = "whole", sphere: Sphere = "deltas", linear_above: Above = 1.0
) -> Dense:
    """Spherical interpolation between two experts' deltas: `slerp` around the base, with a straight line only where it must be.

    theta = theta_0 + (sin((1 - t) a) delta_1 + sin(t a) delta_2) / sin a,  cos a = <delta_1, delta_2> / (|delta_1| |delta_2|),
    t = w_2 / (w_1 + w_2), equal weights if both are 0. mergekit 0.1.5 with a base model is sphere: deltas, without one sphere: weights;
    its `nuslerp_flatten: false` is vectors: rows, with `nuslerp_row_wise: true` vectors: columns.
    """
    return slerp(base, deltas, weights, vectors=vectors, sphere=sphere, linear_above=linear_above)


@method("karcher", source="Karcher 1977, Riemannian center of mass, doi:10.1002/cpa.3160300502")
def karcher(base: Dense, deltas: Deltas, weights: Weights, *, sphere: Sphere = "weights") -> Dense:
    """Weighted mean on the sphere of any number of experts: SLERP for many.

    theta = (sum_q w_q |theta_q|) * mu,  mu = the unit vector with sum_q w_q log_mu(theta_q / |theta_q|) = 0: the point of least weighted
    squared angle, from the normalised mean by steps mu <- exp_mu(sum_q w_q log_mu(u_q)) until they vanish (mergekit 0.1.5: 10 steps or
    1e-5, equal weights). A vector of 0 only shortens the result; where opposite vectors have no mean direction, the plain mean is taken.
    """
    products = _products(base, deltas, "whole", sphere)[0]
    return _combine(base, deltas, _karcher(products, _shares(weights, products))[None], "whole", sphere)


def _products(base: Tensor, deltas: Sequence[Tensor], vectors: Vectors, sphere: str) -> Float[Tensor, "r k k"]:
    """Inner products of the experts' vectors: their deltas, or their weights theta_q = theta_0 + delta_q."""
    if sphere == "deltas":
        return inner_products(deltas, vectors)
    mixing = torch.cat([torch.ones(len(deltas), 1), torch.eye(len(deltas))], dim=1).to(base.device).double()
    return mixing @ inner_products([base, *deltas], vectors) @ mixing.T


def _shares(weights: Weights, products: Tensor) -> Float[Tensor, " k"]:
    """Weights over their sum, float64, where the inner products are; equal where all are 0."""
    shares = products.new_tensor(weights)
    return shares / shares.sum() if shares.sum() else torch.full_like(shares, 1 / len(weights))


def _arc(products: Float[Tensor, "r 2 2"], t: Float[Tensor, ""], linear_above: float) -> Float[Tensor, "r 2"]:
    """Coefficients of the point at t on the arc between two vectors, or on the straight line where there is no arc to speak of."""
    norms = products[:, 0, 0].sqrt() * products[:, 1, 1].sqrt()
    cosine = torch.where(norms > 0, products[:, 0, 1] / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0).clamp(-1, 1)
    straight = (cosine.abs() > linear_above) | (1 - cosine.square() < 1e-14)
    angle = torch.where(straight, torch.pi / 2, torch.acos(cosine))
    curved = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], dim=1) / torch.sin(angle)[:, None]
    return torch.where(straight[:, None], torch.stack([1 - t, t]), curved)


def _karcher(products: Float[Tensor, "k k"], shares: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Every iterate is mu = sum_q a_q u_q with u_q the unit vectors, so a step needs only a and the cosines C: <mu, u_q> = (C a)_q."""
    norms, plain = products.diagonal().sqrt(), shares
    length = (shares * norms).sum()
    shares = torch.where(norms > 0, shares, 0.0)
    if not shares.sum() > 0:
        return plain
    shares = shares / shares.sum()
    norms = torch.where(norms > 0, norms, 1.0)
    cosines = products / torch.outer(norms, norms)
    a, size = shares, _norm(cosines, shares)
    if size < 1e-7:
        return plain
    a = a / size
    for _ in range(100):
        dots = (cosines @ a).clamp(-1, 1)
        angles = torch.acos(dots)
        stretch = torch.where((angles > 1e-7) & (angles < torch.pi - 1e-7), angles / torch.sin(angles).clamp(min=1e-300), 1.0)
        step = shares * stretch
        step = step - (shares * stretch * dots).sum() * a  # sum_q w_q (angle / sin angle) (u_q - <mu, u_q> mu)
        size = _norm(cosines, step)
        if size < 1e-10:
            break
        a = torch.cos(size) * a + torch.sin(size) / size * step
        a = a / _norm(cosines, a)
    return a * length / norms


def _norm(cosines: Tensor, a: Tensor) -> Tensor:
    return (a @ cosines @ a).clamp(min=0).sqrt()


def _combine(base: Tensor, deltas: Sequence[Tensor], coefficients: Float[Tensor, "r k"], vectors: Vectors, sphere: str) -> Tensor:
    """sum_q c_q theta_q, or theta_0 + sum_q c_q delta_q, with one set of coefficients per vector."""
    of_base = coefficients.sum(1) if sphere == "weights" else coefficients.new_ones(len(coefficients))
    if vectors == "whole":
        numbers = [float(of_base), *coefficients[0].tolist()]
        return in_pieces(lambda *parts: weighted_sum(parts, numbers), [base, *deltas])
    turned = [columns_last(tensor, vectors) for tensor in (base, *deltas)]
    columns = torch.cat([of_base[:, None], coefficients], dim=1).to(base.dtype)  # (r, k + 1)
    merged = torch.zeros_like(rows(turned[0]))
    for tensor, column in zip(turned, columns.T, strict=True):
        merged.addcmul_(rows(tensor), column[:, None])
    merged = merged.reshape(turned[0].shape)
    return merged.movedim(-1, 0).contiguous() if vectors == "columns" and base.ndim else merged
