"""Typical samples: the rows nearest to the centroids of K-means over the newest expert's embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Typical:
    """Which rows are typical, in the order of the rows, and how many rows each stands for."""

    rows: tuple[int, ...]
    sizes: tuple[int, ...]


def typical_samples(embeddings: np.ndarray, count: int, *, seed: int = 0) -> Typical:
    """D_typ = { argmin_x |e_N(x) - c_j|_2 : j = 1..m }.    embeddings (rows, d), one row of data each -> m rows

    K-means (k-means++ starts, best of four) in float64 on one thread, so that the result depends on the seed alone. The nearest row
    is looked for among the members of its own cluster, which makes the m samples distinct; ties go to the first row.
    With no more different rows than `count`, each of them is typical.

    >>> typical_samples(np.array([[0.0], [0.1], [0.2], [9.0]]), 2)
    Typical(rows=(1, 3), sizes=(3, 1))
    """
    points = np.asarray(embeddings, dtype=np.float64)
    _, first, counts = np.unique(points, axis=0, return_index=True, return_counts=True)
    if len(first) <= count:
        order = np.argsort(first)
        return Typical(tuple(first[order].tolist()), tuple(counts[order].tolist()))

    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        fitted = KMeans(count, n_init=4, random_state=seed).fit(points)  # pyright: ignore[reportArgumentType]
    nearest = {}
    for cluster in range(count):
        members = np.flatnonzero(fitted.labels_ == cluster)
        distances = np.square(points[members] - fitted.cluster_centers_[cluster]).sum(1)
        nearest[int(members[distances.argmin()])] = len(members)
    rows = sorted(nearest)
    return Typical(tuple(rows), tuple(nearest[row] for row in rows))
