"""Interpolation on a sphere: SLERP, NuSLERP and the Karcher mean.

A point between vectors on a sphere is a weighted sum of them. So each method here computes the inner products of its vectors once, finds
the coefficients from that k x k matrix alone, in float64, and forms the weighted sum: two walks over the tensors, whatever the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.methods.options import Sphere, Vectors
from recall_merge.maths.methods.registry import method
from recall_merge.maths.pieces import in_pieces, pieces, rows

Above = Annotated[float, Interval(ge=0, le=1), "vectors with a cosine of more than this, in size, are interpolated on the straight line"]


@method("slerp", source="Shoemake 1985, Animating rotation with quaternion curves, doi:10.1145/325165.325242", experts=(2, 2))
def slerp(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    vectors: Vectors = "whole",
    sphere: Sphere = "weights",
    linear_above: Above = 0.9995,
) -> Tensor:
    """Spherical interpolation between two experts' weights.

    theta = (sin((1 - t) a) theta_1 + sin(t a) theta_2) / sin a,  cos a = <theta_1, theta_2> / (|theta_1| |theta_2|),
    t = w_2 / (w_1 + w_2).    base (*s), two deltas (*s) -> (*s)
    Where the vectors are nearly parallel or opposite, or one is 0, the point on the straight line, (1 - t) theta_1 + t theta_2, is taken;
    fine-tunes of one base are nearly parallel, so for them SLERP of the weights is the linear average in all but name. Conventions
    are mergekit 0.1.5's (lengths are kept as they are, threshold 0.9995). Only the ratio of the weights matters, w = 0, 0 counts as equal.
    """
    return _between(base, deltas, weights, vectors, sphere, linear_above)


@method("nuslerp", source="Goddard 2024, mergekit's NuSLERP, github.com/arcee-ai/mergekit docs/merge_methods.md", experts=(2, 2))
def nuslerp(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    vectors: Vectors = "whole",
    sphere: Sphere = "deltas",
    linear_above: Above = 1.0,
) -> Tensor:
    """Spherical interpolation between two experts' deltas: `slerp` around the base, with a straight line only where it must be.

    theta = theta_0 + (sin((1 - t) a) delta_1 + sin(t a) delta_2) / sin a,  cos a = <delta_1, delta_2> / (|delta_1| |delta_2|),
    t = w_2 / (w_1 + w_2).    base (*s), two deltas (*s) -> (*s)
    mergekit 0.1.5 with a base model is sphere: deltas, without one sphere: weights; its `nuslerp_flatten: false` is vectors: rows,
    with `nuslerp_row_wise: true` vectors: columns. Only the ratio of the weights matters, w = 0, 0 counts as equal.
    """
    return _between(base, deltas, weights, vectors, sphere, linear_above)


@method("karcher", source="Karcher 1977, Riemannian center of mass, doi:10.1002/cpa.3160300502")
def karcher(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, sphere: Sphere = "weights") -> Tensor:
    """Weighted mean on the sphere of any number of experts: SLERP for many.

    theta = (sum_q w_q |theta_q|) * mu,  mu = the unit vector with sum_q w_q log_mu(theta_q / |theta_q|) = 0: the point of least weighted
    squared angle, from the normalised mean by steps mu <- exp_mu(sum_q w_q log_mu(u_q)) until they vanish.    base (*s), k of (*s) -> (*s)
    mergekit 0.1.5 stops after 10 steps or at a step of 1e-5, and its weights are equal; ours are those of the run, over their sum. A vector
    of 0 has no direction and only shortens the result; where the mean direction is undefined (opposite vectors), the plain mean is taken.
    """
    coefficients = _karcher(_grams(base, deltas, "whole", sphere)[0], _shares(weights, len(deltas)))
    return _combine(base, deltas, coefficients[None], "whole", sphere)


def _between(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], vectors: Vectors, sphere: Sphere, linear_above: float
) -> Tensor:
    products = _grams(base, deltas, vectors, sphere)  # (r, 2, 2)
    t = _shares(weights, 2)[1]
    norms = products[:, 0, 0].sqrt() * products[:, 1, 1].sqrt()
    cosine = torch.where(norms > 0, products[:, 0, 1] / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0).clamp(-1, 1)
    straight = (cosine.abs() > linear_above) | (1 - cosine.square() < 1e-14)
    angle = torch.where(straight, torch.pi / 2, torch.acos(cosine))
    curved = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], dim=1) / torch.sin(angle)[:, None]
    return _combine(base, deltas, torch.where(straight[:, None], torch.stack([1 - t, t]), curved), vectors, sphere)


def _karcher(products: Tensor, share: Tensor) -> Tensor:
    """Coefficients of the Karcher mean.    products (k, k) of the vectors, share (k,) -> (k,)

    Every iterate is sum_q a_q u_q with u_q the unit vectors, so a step needs only a and the cosines C: <mu, u_q> = (C a)_q.
    """
    norms, plain = products.diagonal().sqrt(), share
    length = (share * norms).sum()
    share = torch.where(norms > 0, share, 0.0)
    if not share.sum() > 0:
        return plain
    share = share / share.sum()
    norms = torch.where(norms > 0, norms, 1.0)
    cosines = products / torch.outer(norms, norms)
    a = share
    size = _norm(cosines, a)
    if size < 1e-7:
        return plain
    a = a / size
    for _ in range(100):
        dots = (cosines @ a).clamp(-1, 1)
        angles = torch.acos(dots)
        stretch = torch.where((angles > 1e-7) & (angles < torch.pi - 1e-7), angles / torch.sin(angles).clamp(min=1e-300), 1.0)
        step = share * stretch
        step = step - (share * stretch * dots).sum() * a  # sum_q w_q (angle / sin angle) (u_q - <mu, u_q> mu)
        size = _norm(cosines, step)
        if size < 1e-10:
            break
        a = torch.cos(size) * a + torch.sin(size) / size * step
        a = a / _norm(cosines, a)
    return a * length / norms


def _norm(cosines: Tensor, a: Tensor) -> Tensor:
    return (a @ cosines @ a).clamp(min=0).sqrt()


def _shares(weights: Sequence[float], k: int) -> Tensor:
    """Weights over their sum, float64; equal where all are 0."""
    given = torch.tensor(weights, dtype=torch.float64)
    return given / given.sum() if given.sum() else torch.full((k,), 1 / k, dtype=torch.float64)


def gram(tensors: Sequence[Tensor], vectors: Vectors = "whole") -> Tensor:
    """Inner products of n tensors, whole or vector by vector.    n of (*s) -> (r, n, n) in float64, r = 1 for whole

    Summed in the tensors' precision within a piece or row, in float64 over the pieces. No BLAS: its sums depend on where a tensor lies
    in memory, and the same merge must give the same bytes.

    >>> gram([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])]).tolist()
    [[[5.0, 6.0], [6.0, 9.0]]]
    """
    if vectors == "columns":
        tensors = [tensor.movedim(0, -1) if tensor.ndim else tensor for tensor in tensors]
    first, second = torch.triu_indices(len(tensors), len(tensors)).tolist()
    found = []
    for piece in pieces(*tensors, by_row=vectors != "whole"):
        products = [(piece[p] * piece[q]).sum(-1) for p, q in zip(first, second, strict=True)]
        found.append(torch.stack(products, dim=-1).double())
    sums = torch.stack(found).sum(0, keepdim=True) if vectors == "whole" else torch.cat(found)
    matrices = sums.new_zeros(len(sums), len(tensors), len(tensors))
    matrices[:, first, second] = matrices[:, second, first] = sums
    return matrices


def _grams(base: Tensor, deltas: Sequence[Tensor], vectors: Vectors, sphere: Sphere) -> Tensor:
    """Inner products of the experts' vectors, from those of the base and the deltas where the weights are the vectors.    -> (r, k, k)"""
    if sphere == "deltas":
        return gram(deltas, vectors)
    mixing = torch.cat([torch.ones(len(deltas), 1), torch.eye(len(deltas))], dim=1).double()  # theta_q = theta_0 + delta_q
    return mixing @ gram([base, *deltas], vectors) @ mixing.T


def _combine(base: Tensor, deltas: Sequence[Tensor], coefficients: Tensor, vectors: Vectors, sphere: Sphere) -> Tensor:
    """sum_q c_q theta_q, or theta_0 + sum_q c_q delta_q, with one set of coefficients a vector.    coefficients (r, k) -> (*s)"""
    of_base = coefficients.sum(1) if sphere == "weights" else torch.ones(len(coefficients), dtype=torch.float64)
    if vectors == "whole":
        numbers = coefficients[0].tolist()

        def total(piece: Tensor, *changes: Tensor) -> Tensor:
            merged = piece * float(of_base)
            for change, number in zip(changes, numbers, strict=True):
                merged.add_(change, alpha=number)
            return merged

        return in_pieces(total, [base, *deltas])
    turned = [tensor.movedim(0, -1) if vectors == "columns" and tensor.ndim else tensor for tensor in (base, *deltas)]
    columns = torch.cat([of_base[:, None], coefficients], dim=1).to(base.dtype)  # (r, k + 1)
    merged = torch.zeros_like(rows(turned[0]))
    for tensor, column in zip(turned, columns.T, strict=True):
        merged.addcmul_(rows(tensor), column[:, None])
    merged = merged.reshape(turned[0].shape)
    return merged.movedim(-1, 0).contiguous() if vectors == "columns" and base.ndim else merged
