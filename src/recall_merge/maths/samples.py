"""Typical samples: the rows nearest to the centroids of K-means over the newest expert's embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Num


@dataclass(frozen=True)
class Typical:
    """Which rows are typical, in ascending order, and how many rows each stands for."""

    rows: tuple[int, ...]
    sizes: tuple[int, ...]


def typical_samples(embeddings: Num[np.ndarray, "rows d"], count: int, *, seed: int = 0) -> Typical:
    """D_typ = { argmin_x |e_N(x) - c_j|_2 : j = 1..m }, m = `count`. embeddings holds e_N(x), one row per row of data.

    K-means (k-means++ starts, best of four) runs in float64 on one thread, so that the result depends on the seed alone. Each centroid
    takes the nearest row of its own cluster, which makes the m samples distinct; of equally near rows, up to rounding, the first. Where
    the data has no more than `count` different rows, all of these are typical.

    >>> typical_samples(np.array([[0.0], [0.1], [0.2], [9.0]]), 2)
    Typical(rows=(1, 3), sizes=(3, 1))
    """
    points = np.asarray(embeddings, dtype=np.float64)
    _, first_rows, counts = np.unique(points, axis=0, return_index=True, return_counts=True)
    if len(first_rows) <= count:
        order = np.argsort(first_rows)
        return Typical(tuple(first_rows[order].tolist()), tuple(counts[order].tolist()))

    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        clusters = KMeans(count, n_init=4, random_state=seed).fit(points)  # pyright: ignore[reportArgumentType]
    size_of = {}
    for cluster, centroid in enumerate(clusters.cluster_centers_):
        members = np.flatnonzero(clusters.labels_ == cluster)
        distances = np.square(points[members] - centroid).sum(1)
        size_of[int(members[distances.argmin()])] = len(members)
    rows = sorted(size_of)
    return Typical(tuple(rows), tuple(size_of[row] for row in rows))
