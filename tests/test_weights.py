"""Weights: softmax, ablations, the ends of the model, ramps and given numbers, against loops and by hand."""

import math

import numpy as np
import pytest
import torch

from recall_merge.maths.weights import ablate, along_blocks, interpolated, normalised, outside_blocks, softmax_weights


def random_similarity(layers, n, seed=0):
    s = np.random.default_rng([layers, n, seed]).random((layers, n))
    s[:, -1] = 1
    return s


def softmax_by_loops(s, temperature):
    """exp(S_q / tau) / sum_p exp(S_p / tau), with the largest S taken off so that a small tau does not overflow."""
    rows = []
    for row in s:
        powers = [math.exp((value - max(row)) / temperature) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows


# --- softmax -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 2.5, 1e3])
def test_softmax_agrees_with_loops(n, temperature):
    s = random_similarity(4, n)
    found = softmax_weights(torch.from_numpy(s), temperature=temperature)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), softmax_by_loops(s.tolist(), temperature), rtol=1e-9, atol=1e-300)


def test_the_temperature_is_1_by_default_and_a_smaller_one_sharpens():
    s = torch.from_numpy(random_similarity(3, 4))
    assert torch.equal(softmax_weights(s), softmax_weights(s, temperature=1.0))
    newest = [softmax_weights(s, temperature=tau)[:, -1] for tau in (0.1, 1.0, 10.0)]
    assert (newest[0] > newest[1]).all() and (newest[1] > newest[2]).all()


def test_the_limits_of_the_temperature():
    s = torch.tensor([[0.2, 0.9, 1.0], [1.0, 0.5, 1.0]], dtype=torch.float64)
    assert softmax_weights(s, temperature=1e-300).tolist() == [[0, 0, 1], [0.5, 0, 0.5]]
    for tau in (1e-38, 1e-39, 1e-320):  # where S / tau overflows
        for dtype in (torch.float32, torch.float64):
            assert softmax_weights(s.to(dtype), temperature=tau).tolist() == [[0, 0, 1], [0.5, 0, 0.5]]
            assert softmax_weights(-s.to(dtype), temperature=tau).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert softmax_weights(s, temperature=1e300).flatten().tolist() == pytest.approx([1 / 3] * 6, rel=1e-15)


@pytest.mark.parametrize(("n", "most"), [(2, 0.731), (3, 0.576), (5, 0.405)])
def test_the_newest_has_between_1_in_n_and_the_known_bound(n, most):
    unlike, alike = torch.eye(n, dtype=torch.float64)[-1:], torch.ones(1, n, dtype=torch.float64)
    assert round(float(softmax_weights(unlike)[0, -1]), 3) == most
    assert float(softmax_weights(unlike)[0, -1]) == pytest.approx(math.e / (math.e + n - 1), rel=1e-15)
    assert softmax_weights(alike)[0].tolist() == pytest.approx([1 / n] * n, rel=1e-15)


# --- the ends of the model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("nearest", [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]),
        ("uniform", [[1 / 3, 1 / 3, 1 / 3], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]),
        ("newest", [[0, 0, 1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6], [0, 0, 1]]),
    ],
)
def test_weights_outside_of_the_blocks(choice, expected):
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]], dtype=torch.float64)
    before = weights.clone()
    found = outside_blocks(weights, choice)
    assert found.tolist() == expected
    assert found.dtype == torch.float64
    assert torch.equal(weights, before), "the weights that came in are not written to"


def test_outside_weights_are_nearest_by_default_and_1_for_a_single_model():
    assert outside_blocks(torch.tensor([[0.5, 0.5], [0.1, 0.9]])).tolist() == torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.1, 0.9]]).tolist()
    for choice in ("nearest", "uniform", "newest"):
        assert outside_blocks(torch.ones(2, 1), choice).tolist() == [[1], [1], [1]]


# --- ablations ---------------------------------------------------------------------------------------------------------------------------

HAND = torch.tensor([[0.3, 0.2, 0.5], [0.1, 0.3, 0.6], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]], dtype=torch.float64)  # the newest: mean 0.6


def test_ablations_by_hand():
    assert torch.equal(ablate(HAND, "none"), HAND)
    assert ablate(HAND, "uniform").flatten().tolist() == pytest.approx([1 / 3] * 12, rel=1e-15)
    assert ablate(HAND, "tilt").tolist() == [pytest.approx([0.2, 0.2, 0.6])] * 4
    # from 1/3, with mean 0.6, so up to 2 * 0.6 - 1/3 = 0.8667, in steps of 0.1778; the other two share the rest
    newest = [0.3333, 0.5111, 0.6889, 0.8667]
    assert ablate(HAND, "ramp").tolist() == [pytest.approx([(1 - w) / 2, (1 - w) / 2, w], abs=1e-4) for w in newest]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("layers", [2, 7])
def test_ablations_keep_sums_shape_and_where_promised_the_newest_models_mean(n, layers):
    weights = softmax_weights(torch.from_numpy(random_similarity(layers, n)))
    for kind in ("none", "uniform", "tilt", "ramp", "permuted"):
        found = ablate(weights, kind)
        assert (found.shape, found.dtype) == (weights.shape, weights.dtype)
        assert found.sum(1).tolist() == pytest.approx([1] * layers, rel=1e-12), kind
        if kind != "uniform":
            assert float(found[:, -1].mean()) == pytest.approx(float(weights[:, -1].mean()), rel=1e-12), kind


def test_a_ramp_extrapolates_where_the_mean_is_high():
    weights = torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)
    assert ablate(weights, "ramp").tolist() == [[0.5, 0.5], [0.0, 1.0], [-0.5, 1.5]]


def test_permuted_assigns_the_rows_to_layers_by_the_seed():
    weights = torch.from_numpy(random_similarity(9, 3))
    found = ablate(weights, "permuted", seed=4)
    assert sorted(found.tolist()) == sorted(weights.tolist()), "whole rows, each once"
    assert torch.equal(found, ablate(weights, "permuted", seed=4))
    assert not torch.equal(found, weights)
    assert not torch.equal(found, ablate(weights, "permuted", seed=5))
    assert torch.equal(ablate(weights, "permuted"), ablate(weights, "permuted", seed=0))


def test_the_permutation_is_the_one_that_earlier_results_used():
    rows = torch.arange(6, dtype=torch.float64).unsqueeze(1)
    assert ablate(rows, "permuted", seed=0).flatten().tolist() == [2, 5, 3, 0, 1, 4]
    assert ablate(rows, "permuted", seed=1).flatten().tolist() == [1, 5, 2, 0, 3, 4]


# --- given weights -----------------------------------------------------------------------------------------------------------------------


def test_given_weights_are_scaled_to_sum_to_1():
    assert normalised([1, 3]) == [0.25, 0.75]
    assert normalised([0, 0.5, 0]) == [0, 1, 0]
    assert normalised([1e-300]) == [1]
    assert sum(normalised([0.1] * 7)) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [2, -1], [-1, -1], [math.nan, 1], [1, math.nan], [math.inf, 1], [1e308, 1e308]])
def test_weights_that_cannot_be_scaled_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be finite, not negative, and not all 0"):
        normalised(weights)


def on_the_line(points, t):
    """The value at a share t of the way, by a search for the piece that holds it."""
    width = 1 / (len(points) - 1)
    piece = next(k for k in range(len(points) - 1) if t <= (k + 1) * width + 1e-12)
    share = (t - piece * width) / width
    return [low + share * (high - low) for low, high in zip(points[piece], points[piece + 1], strict=True)]


@pytest.mark.parametrize("blocks", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("points", [[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [5.0, 1.0], [2.0, 2.0]], [[0.0], [1.0], [0.0], [4.0], [9.0]]])
def test_rows_along_the_blocks_lie_on_straight_lines_between_the_points(points, blocks):
    rows = along_blocks(points, blocks)
    assert len(rows) == blocks + 2
    for i in range(1, blocks + 1):
        assert rows[i] == pytest.approx(on_the_line(points, (i - 1) / (blocks - 1)), abs=1e-12), i
    assert rows[0] == rows[1] == points[0], "the embedding has the first block's row"
    assert rows[-1] == rows[-2] == points[-1], "final norm and head have the last block's row"


def test_ramps_by_hand():
    assert along_blocks([[0.0, 1.0], [1.0, 0.0]], 3) == [[0, 1], [0, 1], [0.5, 0.5], [1, 0], [1, 0]]
    assert along_blocks([[0.0], [4.0], [0.0]], 5) == [[0], [0], [2], [4], [2], [0], [0]]
    assert along_blocks([[0.0], [1.0]], 1) == [[1], [1], [1]], "a single block lies at the end"
    assert along_blocks([[7.0]], 2) == [[7]] * 4, "one point: the same everywhere"


def test_interpolated_at_the_points_and_between_them():
    points = [[0.0, 10.0], [1.0, 20.0], [3.0, 0.0]]
    assert [interpolated(points, t) for t in (0, 0.5, 1)] == points
    assert interpolated(points, 0.25) == [0.5, 15.0]
    assert interpolated(points, 0.75) == [2.0, 10.0]
