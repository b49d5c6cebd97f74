"""Low-rank approximations: the best of their rank, from a dense delta or from factors."""

import numpy as np
import pytest
import torch

from recall_merge.maths.deltas import LowRank
from recall_merge.maths.low_rank import squared_error, truncate

RNG = np.random.default_rng(0)
UP, DOWN = RNG.normal(size=(7, 4)), RNG.normal(size=(4, 5))


def best_of_rank(delta, rank):
    u, values, vt = np.linalg.svd(delta)
    return sum(values[k] * np.outer(u[:, k], vt[k]) for k in range(rank))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "delta", [torch.from_numpy(UP @ DOWN), LowRank(torch.from_numpy(UP), torch.from_numpy(DOWN))], ids=["dense", "factors"]
)
def test_truncation_is_the_best_of_its_rank(delta, rank):
    truncated = truncate(delta, rank)
    assert truncated.rank == rank
    assert truncated.dense().numpy() == pytest.approx(best_of_rank(UP @ DOWN, rank), abs=1e-12)
    assert float(truncated.up.norm()) == pytest.approx(float(truncated.down.norm())), "both factors have the same norm"


@pytest.mark.parametrize("rank", [4, 5, 100])
def test_a_rank_that_suffices_gives_the_delta_itself(rank):
    assert truncate(torch.from_numpy(UP @ DOWN), rank).dense().numpy() == pytest.approx(UP @ DOWN, abs=1e-12)


def test_a_float32_delta_is_decomposed_in_float64():
    assert truncate(torch.ones(2, 3), 1).up.dtype == torch.float64


def test_squared_errors_by_hand():
    """delta - u v = [[3, 4], [0, 1]] - [[3, 0], [6, 0]] = [[0, 4], [-6, 1]]: 16 + 36 + 1, of 9 + 16 + 1."""
    approximation = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0]]))
    assert squared_error(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), approximation) == (53.0, 26.0)
