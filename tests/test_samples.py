"""Typical samples: by hand, against a search through all partitions and loops over rows, and where rows or centroids tie."""

import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans

from recall_merge.maths.samples import Typical, typical_samples


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def mean_of(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def nearest_members(points, clusters):
    """For each cluster (a list of rows) its size and the row nearest to its mean, the first of equally near ones."""
    chosen = {}
    for members in clusters:
        centroid = mean_of([points[row] for row in members])
        best = members[0]
        for row in members[1:]:
            if squared_distance(points[row], centroid) < squared_distance(points[best], centroid):
                best = row
        chosen[best] = len(members)
    rows = sorted(chosen)
    return Typical(tuple(rows), tuple(chosen[row] for row in rows))


def best_partition(points, count):
    """The partition with the smallest sum of squared distances to its means, of all there are."""

    def clusters_of(labels):
        return [[row for row, label in enumerate(labels) if label == cluster] for cluster in range(count)]

    def inertia(clusters):
        return sum(squared_distance(points[row], mean_of([points[r] for r in members])) for members in clusters for row in members)

    partitions = (clusters_of(labels) for labels in itertools.product(range(count), repeat=len(points)) if len(set(labels)) == count)
    return min(partitions, key=inertia)


def test_samples_by_hand():
    """Two clusters on a plane. Rows 0, 2, 3, 5 have the mean (1.5, 1.5) and row 3 is nearest, at 0.5; 4.5, 2.5 and 8.5 are the others.
    Rows 1 and 4 are equally near to their mean (99, 0): the first is taken."""
    points = np.array([[0.0, 0.0], [98.0, 0.0], [0.0, 2.0], [2.0, 1.0], [100.0, 0.0], [4.0, 3.0]])
    assert typical_samples(points, 2) == Typical((1, 3), (2, 4))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [(3, 5), (1, 7), (3, 1, 4), (4, 3, 1)])
def test_agrees_with_a_search_through_all_partitions(sizes, seed):
    rng = np.random.default_rng([*sizes, seed])
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))  # subtle: none of 2, whose rows are equally near but for rounding
    points = 20 * np.eye(len(sizes), 3)[labels] + rng.normal(size=(8, 3))
    expected = nearest_members(points.tolist(), best_partition(points.tolist(), len(sizes)))
    assert typical_samples(points, len(sizes), seed=seed) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_the_clusters_are_kmeans_keyed_by_the_seed_and_the_samples_their_nearest_members(seed):
    """Rows without clusters: many partitions are nearly as good, so starts, their number and the seed all tell."""
    points = np.random.default_rng(3).random((120, 2))
    labels = KMeans(12, n_init=4, random_state=seed).fit(points).labels_
    clusters = [[int(row) for row in np.flatnonzero(labels == cluster)] for cluster in range(12)]
    expected = nearest_members(points.tolist(), clusters)
    assert typical_samples(points, 12, seed=seed) == expected
    assert typical_samples(points, 12, seed=seed) == expected, "again the same"
    assert typical_samples(points, 12, seed=seed + 2) != expected
    if seed == 0:
        assert typical_samples(points, 12) == expected


def test_nearest_is_by_the_euclidean_distance():
    """The mean is (0, 0). Row 0 lies at (3, 3): 18 squared, 6 by steps. Row 1 at (0, 5): 25 and 5."""
    cluster = [[3.0, 3.0], [0.0, 5.0], [-3.0, -8.0]]
    far = [[1000.0, 1000.0]]
    assert typical_samples(np.array(cluster + far), 2) == Typical((0, 3), (3, 1))


def test_of_equally_near_rows_the_first_is_taken():
    points = np.array([[896.0], [2.0], [0.0], [2.0], [0.0]])  # the mean of the last four is 1
    assert typical_samples(points, 2) == Typical((0, 1), (1, 4))
    assert typical_samples(points[::-1], 2) == Typical((0, 4), (4, 1))


def test_a_row_halfway_between_two_centroids_belongs_to_one_of_them():
    """-1, 0, 1 in two clusters: {-1, 0} {1} and {-1} {0, 1} are equally good. Every row counts once and the samples are distinct."""
    points = np.array([[-1.0], [0.0], [1.0]])
    for seed in range(8):
        found = typical_samples(points, 2, seed=seed)
        assert found in (Typical((0, 2), (2, 1)), Typical((0, 1), (1, 2)))
        assert found == typical_samples(points, 2, seed=seed)


def test_two_centroids_in_one_place_do_not_take_the_same_row():
    """A ring around its own middle, inside of a wider ring: the means of both coincide, the samples do not."""
    angles = np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = typical_samples(np.concatenate([ring, 2 * ring]), 5, seed=1)
    assert len(set(found.rows)) == 5
    assert sum(found.sizes) == 16


@pytest.mark.parametrize("count", [3, 4, 100])
def test_with_no_more_rows_than_samples_all_are_typical(count):
    points = np.array([[5.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    assert typical_samples(points, count) == Typical((0, 1, 2), (1, 1, 1))


def test_rows_that_repeat_count_once():
    points = np.array([[5.0], [1.0], [5.0], [1.0], [1.0], [0.0]])
    assert typical_samples(points, 3) == Typical((0, 1, 5), (2, 3, 1))
    assert typical_samples(np.ones((4, 2)), 1) == Typical((0,), (4,))
    assert typical_samples(np.ones((4, 2)), 2) == Typical((0,), (4,))


def test_one_sample_is_the_row_nearest_to_the_mean():
    points = np.random.default_rng(0).random((30, 3))
    assert typical_samples(points, 1) == nearest_members(points.tolist(), [list(range(30))])


def test_one_row():
    assert typical_samples(np.array([[1.0, 2.0]]), 1) == Typical((0,), (1,))


def test_float32_is_clustered_in_float64():
    """The first four rows have the mean (0, 0). Row 0 is 2^24 + 1/64 away from it, squared, row 1 is 2^24: one and the same in float32."""
    cluster = [[4096.0, 0.125], [-4096.0, 0.0], [8192.0, -0.125], [-8192.0, 0.0]]
    points = np.array(cluster + [[2.0**20, 0.0]] * 4)
    assert typical_samples(points, 2) == typical_samples(points.astype(np.float32), 2) == Typical((1, 4), (4, 4))
