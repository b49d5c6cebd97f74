"""Examples worked by hand, for every method and for the parts they are made of."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dense import cut_moment
from recall_merge.maths import order_statistics
from recall_merge.maths.consensus import agreeing
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.low_rank import combined, norm, orthonormal, singular
from recall_merge.maths.methods import METHODS, Draws
from recall_merge.maths.methods.informed import fisher, regmean
from recall_merge.maths.moments import Moment
from recall_merge.maths.order_statistics import below, kth_largest, kth_largest_size
from recall_merge.maths.pieces import PIECE, in_pieces, rows
from recall_merge.maths.trimming import drop_by_rank, drop_random, keep_sizes, largest, middle, prune_by_saliency
from recall_merge.maths.weights import lines_scales


def merge(name: str, base, deltas, weights=None, **options) -> Tensor:
    """The method on lists of numbers."""
    deltas = [delta if isinstance(delta, LowRank) else torch.tensor(delta, dtype=torch.float32) for delta in deltas]
    weights = weights or [1 / len(deltas)] * len(deltas)
    return METHODS[name].function(torch.tensor(base, dtype=torch.float32), deltas, weights, **options)


def close(actual: Tensor, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# Sums


def test_linear_is_the_weighted_average():
    close(merge("linear", [1.0, 1.0], [[4.0, 0.0], [0.0, 8.0]], [0.25, 0.75]), [2.0, 7.0])
    close(merge("linear", [1.0, 1.0], [[4.0, 0.0], [0.0, 8.0]], [0.25, 0.75], scale=2.0), [3.0, 13.0])


def test_task_arithmetic_counts_each_delta_in_full():
    close(merge("task_arithmetic", [1.0, 1.0], [[4.0, 0.0], [0.0, 8.0]]), [5.0, 9.0])
    close(merge("task_arithmetic", [0.0], [[4.0], [8.0]], [0.25, 0.75], scale=0.5), [7.0])  # 0.5 * 2 * (1 + 6)


def test_wise_ft_is_a_point_on_the_line():
    close(merge("wise_ft", [2.0], [[4.0]], alpha=0.25), [3.0])


# TIES: the example of the three steps, entry by entry
#   delta_1 = 4 -3  1  0.5     top half: 4 -3  0 0
#   delta_2 = 1  5 -2  0.1     top half: 0  5 -2 0
#   votes (weights 1/2)                  +  +  -  +(0)


TIES = [[4.0, -3.0, 1.0, 0.5], [1.0, 5.0, -2.0, 0.1]]


def test_ties_trims_elects_and_averages_those_that_agree():
    close(merge("ties", [0.0] * 4, TIES, density=0.5), [4.0, 5.0, -2.0, 0.0])
    close(merge("ties", [1.0] * 4, TIES, density=0.5, scale=0.5), [3.0, 3.5, 0.0, 1.0])


def test_ties_elects_after_weighting():
    # entry 1: 0.8 * -3 + 0.2 * 5 < 0, so the heavier expert wins; unweighted, -3 + 5 > 0
    close(merge("ties", [0.0] * 4, TIES, [0.8, 0.2], density=0.5), [4.0, -3.0, -2.0, 0.0])
    close(merge("ties", [0.0] * 4, TIES, [0.8, 0.2], density=0.5, elect="unweighted"), [4.0, 5.0, -2.0, 0.0])


def test_agreeing_divides_by_weights_by_the_share_that_agrees_or_not_at_all():
    deltas = [torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([-1.0])]
    close(agreeing(deltas, [0.5, 0.3, 0.2]), [(1.0 + 1.2) / 0.8])
    close(agreeing(deltas, [0.5, 0.3, 0.2], mean="count"), [(1.0 + 1.2) / (2 / 3)])
    close(agreeing(deltas, [0.5, 0.3, 0.2], mean="none"), [2.2])


def test_an_even_vote_elects_plus_and_counts_may_differ_from_sums():
    close(agreeing([torch.tensor([2.0]), torch.tensor([-2.0])], [0.5, 0.5]), [2.0])
    one_large = [torch.tensor([9.0]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    close(agreeing(one_large, [1 / 3] * 3), [9.0])
    close(agreeing(one_large, [1 / 3] * 3, elect="count"), [-1.5])


def test_experts_of_weight_zero_have_no_vote():
    close(agreeing([torch.tensor([9.0]), torch.tensor([-1.0])], [0.0, 1.0], elect="count"), [-1.0])
    close(agreeing([torch.tensor([9.0]), torch.tensor([-1.0])], [0.0, 0.0]), [0.0])


# Trims


def keep_largest(delta: Tensor, **options) -> Tensor:
    return keep_sizes([delta], largest, **options)[0](delta)


def keep_middle(delta: Tensor, **options) -> Tensor:
    return keep_sizes([delta], middle, **options)[0](delta)


def test_keep_largest_keeps_ties_and_at_least_one():
    delta = torch.tensor([1.0, -2.0, 2.0, 0.5])
    close(keep_largest(delta, density=0.25), [0.0, -2.0, 2.0, 0.0])
    close(keep_largest(delta, density=0.01), [0.0, -2.0, 2.0, 0.0])
    close(keep_largest(delta, density=1.0), delta.tolist())


def test_keep_largest_can_keep_the_sum_of_sizes():
    delta = torch.tensor([1.0, -4.0, 2.0, 1.0])
    close(keep_largest(delta, density=0.5, rescale="l1"), [0.0, -4.0 * 8 / 6, 2.0 * 8 / 6, 0.0])


def test_keep_middle_drops_outliers_first():
    delta = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    close(keep_middle(delta, density=0.3, gamma=0.1), [0, -4.0, 3.0, -2.0, 0, 0, 0, 0, 0, 0])
    close(keep_middle(delta, density=0.3, gamma=0.0), [5.0, -4.0, 3.0, 0, 0, 0, 0, 0, 0, 0])
    # 80 % are to stay: only two of the five outliers can go
    close(keep_middle(delta, density=0.8, gamma=0.5), [0, 0, 3.0, -2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])


def numbers(*values: float):
    """A stream of given numbers."""
    return lambda: lambda shape: torch.tensor(values).reshape(shape)


def test_drop_random_divides_by_the_probability_of_staying():
    delta = torch.tensor([1.0, -2.0, 3.0, 4.0])
    kept = {
        rescale: drop_random([delta], [numbers(0.2, 0.3, 0.24999, 0.25)], density=0.25, rescale=rescale)[0](delta)
        for rescale in ("share", "l1", "none")
    }
    close(kept["share"], [4.0, 0.0, 12.0, 0.0])
    close(kept["l1"], [2.5, 0.0, 7.5, 0.0])  # 10 / 4
    close(kept["none"], [1.0, 0.0, 3.0, 0.0])


def test_drop_by_rank_keeps_large_entries_more_often():
    # ranks 0 1 2 in each row: probabilities 0.3 0.5 0.7
    delta = torch.tensor([[1.0, -3.0, 2.0], [6.0, 5.0, -4.0]])
    draws = numbers(0.31, 0.69, 0.49, 0.71, 0.49, 0.29)
    close(drop_by_rank([delta], [draws], density=0.5, epsilon=0.2, rescale="none")[0](delta), [[0.0, -3.0, 2.0], [0.0, 5.0, -4.0]])
    close(drop_by_rank([delta], [draws], density=0.5, epsilon=0.2)[0](delta), [[0.0, -3.0 / 0.7, 4.0], [0.0, 10.0, -4.0 / 0.3]])


def test_drop_by_rank_narrows_epsilon_where_it_would_leave_zero_to_one():
    delta = torch.tensor([[1.0, 2.0, 3.0]])
    # density 0.8 leaves 0.2 on either side: probabilities 0.6 0.8 1
    close(drop_by_rank([delta], [numbers(0.61, 0.79, 0.999)], density=0.8, epsilon=0.5, rescale="none")[0](delta), [[0.0, 2.0, 3.0]])
    close(drop_by_rank([delta], [numbers(0.999, 0.999, 0.999)], density=1.0, epsilon=0.5)[0](delta), [[1.0, 2.0, 3.0]])


def test_random_trims_keep_their_share_on_average():
    delta = torch.ones(200, 100)
    draws = Draws(0, "w", ("a",))
    for trim in (drop_random, partial(drop_by_rank, epsilon=0.15)):
        kept = trim([delta], draws.streams, density=0.3, rescale="share")[0](delta)
        assert float((kept > 0).float().mean()) == pytest.approx(0.3, abs=0.02)
        assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)


def test_families_are_their_trim_and_their_consensus():
    draws = Draws(0, "w", ("a", "b"))
    deltas = [torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    base = torch.zeros(3, 40)
    dropped = [trim(delta) for trim, delta in zip(drop_random(deltas, draws.streams, density=0.5), deltas, strict=True)]
    merged = {name: METHODS[name].function(base, deltas, [0.6, 0.4], draws=draws) for name in ("dare_linear", "dare_ties")}
    torch.testing.assert_close(merged["dare_linear"], 0.6 * dropped[0] + 0.4 * dropped[1])
    torch.testing.assert_close(merged["dare_ties"], agreeing(dropped, [0.6, 0.4], mean="none"))
    by_rank = drop_by_rank(deltas, draws.streams, density=0.5, epsilon=0.15)
    ranked = [trim(delta) for trim, delta in zip(by_rank, deltas, strict=True)]
    torch.testing.assert_close(METHODS["della"].function(base, deltas, [0.6, 0.4], draws=draws), agreeing(ranked, [0.6, 0.4]))
    middle = [keep_middle(delta, density=0.1, gamma=0.01) for delta in deltas]
    torch.testing.assert_close(METHODS["breadcrumbs"].function(base, deltas, [0.6, 0.4]), 0.6 * middle[0] + 0.4 * middle[1])


@pytest.mark.parametrize(("name", "trim"), [("dare_linear", drop_random), ("della_linear", partial(drop_by_rank, epsilon=0.15))])
def test_the_sum_of_sizes_is_kept_over_the_tensor_with_the_same_numbers(name, trim):
    draws = Draws(0, "w", ("a",))
    delta = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [10.0], [100.0]])
    kept = trim([delta], draws.streams, density=0.5, rescale="none")[0](delta)
    merged = METHODS[name].function(torch.zeros(3, 40), [delta], [1.0], draws=draws, rescale="l1")
    torch.testing.assert_close(merged, kept * delta.abs().sum() / kept.abs().sum())


def test_a_family_walks_in_pieces_as_in_one(monkeypatch):
    deltas = [torch.randn(64, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    draws = Draws(0, "w", ("a", "b"))
    options = {"dare_ties": {"rescale": "l1"}, "della": {}, "ties": {}, "breadcrumbs": {"rescale": "l1"}}
    given = {name: {"draws": draws} if METHODS[name].random else {} for name in options}
    runs = []
    for size in (PIECE, 100):
        monkeypatch.setattr("recall_merge.maths.pieces.PIECE", size)
        runs.append([METHODS[name].function(torch.zeros(64, 40), deltas, [0.6, 0.4], **given[name], **options[name]) for name in options])
    for whole, cut in zip(*runs, strict=True):
        torch.testing.assert_close(whole, cut)


# On the sphere


def test_slerp_of_two_orthogonal_vectors():
    # halfway between (1, 0) and (0, 1) on the circle, not 1/2 1/2
    close(merge("slerp", [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), [math.sqrt(0.5)] * 2)
    # a third of the way: 30 degrees
    close(merge("slerp", [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [2 / 3, 1 / 3]), [math.cos(math.pi / 6), math.sin(math.pi / 6)])


def test_slerp_is_of_weights_and_nuslerp_of_deltas():
    base, deltas = [1.0, 1.0], [[0.0, -1.0], [-1.0, 0.0]]  # weights (1, 0), (0, 1); deltas at a right angle too
    close(merge("slerp", base, deltas), [math.sqrt(0.5)] * 2)
    close(merge("nuslerp", base, deltas), [1 - math.sqrt(0.5)] * 2)
    close(merge("nuslerp", base, deltas, sphere="weights"), [math.sqrt(0.5)] * 2)


def test_nuslerp_by_rows_and_columns():
    deltas = [[[1.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]]  # rows: a right angle; the same
    half = math.sqrt(0.5)
    close(merge("nuslerp", [[0.0] * 2] * 2, deltas, vectors="rows"), [[half, half], [3.0, 0.0]])
    turned = [[list(pair) for pair in zip(*delta, strict=True)] for delta in deltas]
    close(merge("nuslerp", [[0.0] * 2] * 2, turned, vectors="columns"), [[half, 3.0], [half, 0.0]])


def test_the_straight_line_begins_at_the_threshold():
    for cosine, straight in [(0.9996, True), (0.999, False), (-0.9996, True), (-0.999, False)]:
        merged = merge("slerp", [0.0, 0.0], [[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
        half = math.acos(cosine) / 2
        on_the_circle = [math.cos(half), math.sin(half)]
        close(merged, [math.cos(half) ** 2, math.cos(half) * math.sin(half)] if straight else on_the_circle, 2e-5)


def test_nearly_parallel_or_opposite_vectors_take_the_straight_line():
    close(merge("slerp", [0.0, 0.0], [[1.0, 0.0], [3.0, 0.01]]), [2.0, 0.005])
    close(merge("nuslerp", [0.0, 0.0], [[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]), [0.0, 0.0])
    close(merge("nuslerp", [0.0, 0.0], [[0.0, 0.0], [4.0, 0.0]], [0.75, 0.25]), [1.0, 0.0])


def test_karcher_of_two_is_slerp_and_of_three_is_in_the_middle():
    base = [0.0, 0.0, 0.0]
    pair = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    close(merge("karcher", base, pair, [0.3, 0.7]), merge("slerp", base, pair, [0.3, 0.7]).tolist())
    close(merge("karcher", base, [[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]]), [2 / math.sqrt(3)] * 3)
    close(merge("karcher", [0.0], [[1.0], [-3.0]]), [-1.0])  # opposite: the plain mean


# Moments


def test_model_stock_draws_back_by_the_angle():
    # cos = 1/2 of two: t = 2 * 0.5 / 1.5 = 2/3 of the mean
    root = math.sqrt(0.75)
    close(merge("model_stock", [1.0, 0.0], [[1.0, 0.0], [0.5, root]]), [1 + 0.75 * 2 / 3, root / 2 * 2 / 3])
    close(merge("model_stock", [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), [1.0, 0.0])  # a right angle: the base
    close(merge("model_stock", [1.0, 0.0], [[1.0, 0.0], [-1.0, 0.1]]), [1.0, 0.0])  # opposed: the base
    rows_apart = [[[1.0, 0.0], [2.0, 2.0]], [[0.0, 1.0], [2.0, 2.0]]]  # rows: a right angle; the same
    close(merge("model_stock", [[0.0] * 2] * 2, rows_apart, vectors="rows"), [[0.0, 0.0], [2.0, 2.0]])


def test_magmax_takes_the_largest():
    close(merge("magmax", [1.0, 1.0, 1.0], [[3.0, -1.0, 2.0], [1.0, -4.0, -2.0]]), [4.0, -3.0, 3.0])
    close(merge("magmax", [0.0], [[3.0], [-2.0]], [0.25, 0.75], scale=2.0), [-6.0])  # 1.5 against -3


def test_sce_selects_calculates_and_erases():
    # variances over the two: 1, 9, 0, 0.25; half of the three that vary is one: the second entry
    close(merge("sce", [0.0] * 4, [[1.0, 6.0, 2.0, 0.0], [3.0, 0.0, 2.0, 1.0]], density=0.5), [0.0, 6.0, 0.0, 0.0])
    # all entries: eta = 1^2 + 2^2 = 5 and 3^2 + 1^2 = 10 of 15; the second entry elects +, so -1 is erased
    close(merge("sce", [0.0] * 2, [[1.0, 2.0], [3.0, -1.0]], density=1.0), [(5 * 1 + 10 * 3) / 15, 2.0])
    close(merge("sce", [0.0] * 2, [[1.0, 2.0], [3.0, 2.0]], density=1.0)[1:], [2.0])  # an entry in which they agree is one of all


def test_pcb_keeps_winners():
    # norm(|v|) = 0, 1/3, 1 in both; delta * sum = 2, 8, 32 and the same: tanh ~ 0.96, 1, 1; scores rise with size
    delta = [1.0, 2.0, 4.0]
    merged = merge("pcb", [0.0] * 3, [delta, delta], density=0.5)
    close(merged, [0.0, 0.0, 4.0])  # int(3 * 0.5) = 1 goes, the lowest that stays scores 0
    close(merge("pcb", [0.0] * 3, [delta, delta], density=1.0), [0.0, 2.0, 4.0])
    close(merge("pcb", [0.0] * 3, [delta, [-4.0, 2.0, 1.0]], density=1.0)[1:2], [2.0])


def test_pcb_of_very_many_experts_does_not_overflow():
    close(merge("pcb", [0.0] * 3, [[1.0, 2.0, 4.0]] * 200, density=1.0), [0.0, 0.0, 4.0])


# Singular vectors


def test_tsv_keeps_orthogonal_experts_as_they_are():
    deltas = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]]
    close(merge("tsv", [[1.0] * 2] * 2, deltas), [[4.0, 1.0], [1.0, 6.0]])
    close(merge("tsv", [[0.0] * 2] * 2, deltas, [0.25, 0.75]), [[1.5, 0.0], [0.0, 7.5]])  # 2 w_q


def test_tsv_turns_overlapping_directions_apart():
    # left vectors e1 and (e1 + e2) / sqrt 2, right vectors e1 and e2: the left ones are turned to the nearest orthogonal pair
    half = math.sqrt(0.5)
    merged = merge("tsv", [[0.0] * 2] * 2, [[[1.0, 0.0], [0.0, 0.0]], [[0.0, half], [0.0, half]]])
    angle = math.pi / 8  # 45 degrees between them become 90: each turns by 22.5
    close(merged, [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def test_tsv_cuts_each_expert_at_its_share_of_the_rank():
    two = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist()
    one = torch.diag(torch.tensor([0.0, 0.0, 6.0, 5.0])).tolist()
    close(merge("tsv", torch.zeros(4, 4).tolist(), [two, one]), torch.diag(torch.tensor([4.0, 3.0, 6.0, 5.0])).tolist())
    close(merge("tsv", torch.zeros(4, 4).tolist(), [two, one], rank=1), torch.diag(torch.tensor([4.0, 0.0, 6.0, 0.0])).tolist())


def test_tsv_leaves_out_experts_that_change_nothing():
    full, none = [[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    close(merge("tsv", none, [full, none]), full)  # all of its rank, not half


def test_null_spaces_keep_what_only_one_expert_reads():
    # the first reads x1 and x2, the second x1 and x3; x1 leaves both
    first, second = [[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 2.0], [4.0, 0.0, 0.0]]
    none = [[0.0] * 3] * 2
    close(merge("null_space", none, [first, second]), [[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    close(merge("null_space", none, [first, second], share=0), [[3.0, 0.0, 2.0], [4.0, 1.0, 0.0]])
    close(merge("null_space", none, [first, second], [0.25, 0.75], scale=2.0), [[0.0, 0.0, 6.0], [0.0, 1.0, 0.0]])  # 2 w_q, doubled
    apart = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]]
    close(merge("null_space", [[1.0] * 2] * 2, apart, share=1), [[4.0, 1.0], [1.0, 6.0]])
    close(merge("null_space", none, [first, none]), first)


def test_spectral_methods_average_what_is_no_matrix():
    for name in ("tsv", "isotropic", "null_space"):
        close(merge(name, [1.0], [[2.0], [4.0]], [0.25, 0.75], scale=2.0), [8.0])


def test_isotropic_makes_singular_values_equal():
    deltas = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -5.0]]]
    close(merge("isotropic", [[0.0] * 2] * 2, deltas), [[4.0, 0.0], [0.0, -4.0]])
    # an empty direction stays empty: the mean is over the rank
    close(merge("isotropic", [[0.0] * 2] * 2, deltas[:1], scale=0.5), [[1.5, 0.0], [0.0, 0.0]])


def test_isotropic_with_task_specific_directions():
    # the sum is diag(9, 8, 2, 1); half of its 4 directions are common: e1, e2. Beside them the first has 2 on e3, the second 1 on e4.
    deltas = [torch.diag(torch.tensor([9.0, 0.0, 2.0, 0.0])).tolist(), torch.diag(torch.tensor([0.0, 8.0, 0.0, 1.0])).tolist()]
    close(merge("isotropic", torch.zeros(4, 4).tolist(), deltas, common=0.5), (torch.eye(4) * 5).tolist())


@pytest.mark.parametrize("factors", [False, True])
def test_isotropic_takes_no_rounding_for_a_direction(factors):
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    # as above; the second lies in the common directions, so beside them it has nothing: the mean of 14, 8 and the first's 2
    first, second = turn[:, :4] * torch.tensor([9.0, 8.0, 2.0, 1.0]), turn[:, :1] * 5
    low = [LowRank(first, turn[:, :4].T.contiguous()), LowRank(second, turn[:, :1].T.contiguous())]
    deltas = low if factors else [delta.dense().tolist() for delta in low]
    close(merge("isotropic", torch.zeros(12, 12).tolist(), deltas, common=0.5), (turn[:, :3] @ turn[:, :3].T * 8).tolist())


def test_opcm_adds_only_what_is_new():
    first = [[4.0, 0.0], [0.0, 0.0]]
    second = [[3.0, 1.0], [0.0, 2.0]]
    # U = V = e1, its one singular value is more than half of the sum: only the diagonal entry 3 is taken out; lengths 4 and sqrt 14
    added = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    length = (4 + math.sqrt(14)) / 2 / math.sqrt(21)
    close(merge("opcm", [[0.0] * 2] * 2, [first, second]), (added * length).tolist())
    close(merge("opcm", [[0.0] * 2] * 2, [first, second], growth="sqrt"), (added / math.sqrt(2)).tolist())


def test_opcm_clears_the_leading_block():
    first = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    second = torch.arange(1.0, 10.0).reshape(3, 3)
    # shares of the spectrum 3/6, 5/6, 6/6: alpha 0.9 keeps the first 2 x 2 block clear, and the diagonal everywhere
    added = first + torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 6.0], [7.0, 8.0, 0.0]])
    merged = merge("opcm", torch.zeros(3, 3).tolist(), [first.tolist(), second.tolist()], alpha=0.9, growth="sqrt")
    close(merged, (added / math.sqrt(2)).tolist())


def test_opcm_sums_what_is_no_matrix():
    close(merge("opcm", [0.0, 0.0], [[3.0, 0.0], [0.0, 4.0]]), [3 * 3.5 / 5, 4 * 3.5 / 5])  # length 5, mean length 3.5


# Low-rank algebra


def test_singular_of_factors_is_that_of_their_product():
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(9, 2, generator=generator), torch.randn(2, 6, generator=generator))
    for parts in (singular(low), singular(low.dense())):
        assert parts.values.shape == (2,)
        torch.testing.assert_close((parts.left * parts.values) @ parts.right.T, low.dense().double(), rtol=1e-5, atol=1e-5)
    assert norm(low) == pytest.approx(float(low.dense().norm()), rel=1e-5)
    assert len(singular(torch.zeros(3, 4)).values) == 0


def test_combined_stays_low_rank_if_all_are():
    low = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    assert isinstance(combined([low, low], [1.0, 2.0]), LowRank)
    mixed = combined([low, torch.ones(2, 3)], [1.0, 2.0])
    assert isinstance(mixed, Tensor)
    close(mixed, [[3.0] * 3] * 2)


def test_orthonormal_is_the_nearest_orthonormal_set():
    vectors = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = orthonormal(vectors)
    torch.testing.assert_close(merged.T @ merged, torch.eye(3, dtype=torch.float64))
    u, _, vt = np.linalg.svd(vectors.numpy(), full_matrices=False)
    np.testing.assert_allclose(merged.numpy(), u @ vt, atol=1e-12)


def test_orthonormal_takes_nearly_equal_vectors_for_one_direction():
    half = math.sqrt(0.5)
    close(orthonormal(torch.tensor([[1.0, 1.0], [0.0, 1e-6]])), [[half, half], [0.0, 0.0]])


# Selection


@pytest.mark.parametrize("kind", ["normal", "rounded", "constant", "sparse", "sorted", "periodic", "negative"])
def test_kth_largest_is_exact(kind):
    generator = torch.Generator().manual_seed(0)
    n = 300_007
    values = torch.randn(n, generator=generator)
    values = {
        "normal": values,
        "rounded": (values * 4).round() / 4,
        "constant": torch.full((n,), 2.0),
        "sparse": torch.where(values > 3, values, 0.0),
        "sorted": values.sort().values,
        "periodic": values * (torch.arange(n) % 9 == 0),
        "negative": values - 10,
    }[kind]
    for size in (False, True):
        ordered = (values.abs() if size else values).sort(descending=True).values
        for k in (1, 2, n // 100, n // 5, n // 2, n - 1, n):
            assert kth_largest(values, k, size=size) == float(ordered[k - 1])
            if size:
                assert kth_largest_size(lambda span: values[span.start : span.stop], n, k, span=1 << 16) == float(ordered[k - 1])


def test_kth_largest_searches_a_bracket_and_widens_it_where_the_sample_misleads(monkeypatch):
    searched, passes, select = [], [], order_statistics._select
    monkeypatch.setattr(order_statistics, "_select", lambda numbers, k: searched.append(len(numbers)) or select(numbers, k))
    n = 300_007
    values = torch.randn(n, generator=torch.Generator().manual_seed(0))
    kth_largest(values, n // 5)
    assert searched.pop() < n // 8
    step = n * order_statistics._RUN // order_statistics._SAMPLE
    seen = torch.arange(n) % step < order_statistics._RUN  # all that the sample sees is small
    misleading = torch.where(seen, values * 1e-3, values)
    assert kth_largest(misleading, n // 5) == float(misleading.sort(descending=True).values[n // 5 - 1])

    def read(span):
        passes.append(span.start == 0)
        return misleading.abs()[span.start : span.stop]

    kth_largest_size(read, n, n // 5, span=1 << 16)
    assert sum(passes) > 2  # the sample, and more than one bracket


def test_below_is_the_next_number_down():
    assert below(1.0, torch.float32) == 1 - 2**-24
    assert below(1.0, torch.float64) == 1 - 2**-53
    assert below(0.0, torch.float32) == 0.0


def test_pieces_cover_everything_once():
    whole = torch.arange(float(3 * PIECE + 5))
    assert torch.equal(in_pieces(lambda piece: piece + 1, [whole]), whole + 1)
    table = torch.arange(float(6)).reshape(2, 3)
    assert torch.equal(in_pieces(lambda piece: piece.flip(-1), [table], by_row=True), table.flip(-1))
    assert rows(torch.zeros(2, 3, 4)).shape == (6, 4)
    assert rows(torch.tensor(1.0)).shape == (1, 1)


# With statistics of the experts' data


def test_fisher_weighs_each_entry_by_its_information():
    def know(*reads):
        return Moment(torch.zeros(2, 0), torch.tensor(reads), gradient=torch.tensor([2.0]))

    base, deltas, moments = torch.ones(1, 2), [torch.ones(1, 2), torch.full((1, 2), 5.0)], [know(3.0, 0.0), know(1.0, 0.0)]
    close(fisher(base, deltas, [0.5, 0.5], moments=moments), [[3.0, 4.0]], 1e-4)  # 1 + (3 * 1 + 1 * 5) / 4; nothing known: the mean
    close(fisher(base, deltas, [0.25, 0.75], moments=[know(0.0, 0.0)] * 2), [[5.0, 5.0]])
    assert torch.equal(fisher(base, deltas, [0.0, 0.0], moments=moments), base)
    close(fisher(base, deltas, [0.5, 0.5], moments=[moments[0], None]), [[4.0, 4.0]])  # one without input statistics: the mean


def test_regmean_answers_each_experts_inputs():
    generator = torch.Generator().manual_seed(0)
    base, deltas = torch.randn(3, 4, generator=generator), [torch.randn(3, 4, generator=generator) for _ in range(2)]
    inputs = [torch.randn(2, 4, generator=generator) for _ in range(2)]  # 2 + 2 inputs of width 4: all can be answered at once
    merged = regmean(base, deltas, [0.5, 0.5], moments=[cut_moment(x.T @ x, 4) for x in inputs], offdiagonal=1.0, ridge=1e-9)
    for x, delta in zip(inputs, deltas, strict=True):
        torch.testing.assert_close(merged @ x.T, (base + delta) @ x.T, rtol=1e-3, atol=1e-3)


def test_regmean_without_inputs_is_the_mean_and_with_factors_the_same():
    low = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 3.0]]))
    zero = cut_moment(torch.zeros(3, 3), 3)
    close(regmean(torch.zeros(2, 3), [low, torch.ones(2, 3)], [0.5, 0.5], moments=[zero, zero]), ((low.dense() + 1) / 2).tolist())
    moment = torch.diag(torch.tensor([1.0, 2.0, 3.0])) + 0.1
    moments = [cut_moment(moment, 3), cut_moment(2 * moment, 3)]
    merged = [regmean(torch.zeros(2, 3), [delta, torch.ones(2, 3)], [0.7, 0.3], moments=moments) for delta in (low, low.dense())]
    torch.testing.assert_close(*merged)
    assert regmean(torch.zeros(2, 3), [low], [0.0], moments=[zero]).isfinite().all()


# Around any method


def test_lines_rises_from_alpha_to_alpha_plus_beta():
    assert lines_scales(4, alpha=0.2, beta=0.6) == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert lines_scales(1, alpha=0.2, beta=0.6) == pytest.approx([0.2, 0.8, 0.8])


def test_pruning_keeps_the_salient_entries():
    deltas = [torch.tensor([4.0, 1.0, -3.0]), torch.tensor([4.0, 2.0, 3.0])]  # apart by 0, 0.5, 3 from their mean
    close(torch.stack(prune_by_saliency(deltas, density=0.4)), [[0.0, 0.0, -3.0], [0.0, 0.0, 3.0]])
    close(torch.stack(prune_by_saliency(deltas, density=0.4, saliency="magnitude")), [[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    assert torch.equal(prune_by_saliency(deltas[:1], density=0.4)[0], deltas[0])
    assert torch.equal(prune_by_saliency(deltas, density=1.0)[1], deltas[1])
