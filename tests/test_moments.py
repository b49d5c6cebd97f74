"""Second moments: what compression keeps, against numpy, and shrinking by hand."""

import numpy as np
import pytest
import torch

from recall_merge.maths.moments import Moment, compress, identity


def random_moment(seed, size=12, rows=40):
    """E[x x^T] over rows whose entries are correlated."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) @ rng.normal(size=(size, size))
    return x.T @ x / rows


def test_compression_keeps_the_diagonal_and_at_full_rank_everything():
    wanted = random_moment(1)
    assert compress(torch.from_numpy(wanted), 12).dense().numpy() == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    for rank in (0, 3, 12):
        compressed = compress(torch.from_numpy(wanted), rank)
        assert compressed.factor.shape == (12, rank)
        assert compressed.diagonal.numpy() == pytest.approx(wanted.diagonal(), rel=1e-5)
        assert (compressed.rest >= 0).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_compression_keeps_the_leading_eigenvectors(rank):
    wanted = random_moment(2)
    values, vectors = np.linalg.eigh(wanted)
    leading = sum(values[k] * np.outer(vectors[:, k], vectors[:, k]) for k in range(12 - rank, 12))
    factor = compress(torch.from_numpy(wanted), rank).factor.double().numpy()
    assert factor @ factor.T == pytest.approx(leading, rel=1e-4, abs=1e-3)


def test_a_moment_of_low_rank_needs_no_more_and_a_larger_rank_than_its_size_is_its_size():
    x = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    compressed = compress(torch.from_numpy(x.T @ x), 2)
    assert compressed.dense().numpy() == pytest.approx(x.T @ x, abs=1e-5)
    assert compress(torch.from_numpy(x.T @ x), 99).factor.shape == (3, 3)


def test_shrinking_by_hand():
    """G = [[5, 2], [2, 1]] has the mean diagonal 3: half of the off-diagonal entries, over 3."""
    moment = Moment(torch.tensor([[2.0], [1.0]]), torch.tensor([1.0, 0.0]))
    assert moment.dense().tolist() == [[5, 2], [2, 1]]
    assert moment.diagonal.tolist() == [5, 1]
    assert moment.shrunk(0.5, unit=False).dense().flatten().tolist() == pytest.approx([5, 1, 1, 1])
    assert moment.shrunk(0.5).dense().flatten().tolist() == pytest.approx([5 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert moment.shrunk(0.5).factor.dtype == torch.float64
    assert moment.shrunk(0.0).dense().flatten().tolist() == pytest.approx([5 / 3, 0, 0, 1 / 3])


def test_zero_inputs_become_the_identity_only_where_a_unit_is_asked_for():
    zero = Moment(torch.zeros(3, 1), torch.zeros(3))
    assert torch.equal(zero.shrunk(0.9).dense(), torch.eye(3, dtype=torch.float64))
    assert torch.equal(identity(3).dense(), torch.eye(3, dtype=torch.float64))
    assert not zero.shrunk(0.9, unit=False).dense().any()
