"""The numbers of continual learning: a matrix worked by hand, loops written from the formulas, and what is undefined."""

import math

import numpy as np
import pytest

from recall_merge.maths.metrics import (
    METRICS,
    average_performance,
    backward_transfer,
    bootstrap,
    continual_metrics,
    forgetting,
    forward_transfer,
    item_changes,
    learning_accuracy,
    retention,
    score_matrix,
    unseen_delta,
)

# three tasks; rows: the base, then after learning task 1, 2, 3
HAND = [
    [0.50, 0.20, 0.10],
    [0.90, 0.25, 0.05],
    [0.70, 0.80, 0.30],
    [0.60, 0.85, 0.70],
]
EXPERTS = [0.95, 0.75, 0.10]  # the third expert is no better than the base


def test_every_number_worked_by_hand():
    assert average_performance(HAND) == pytest.approx((0.60 + 0.85 + 0.70) / 3)
    assert learning_accuracy(HAND) == pytest.approx((0.90 + 0.80 + 0.70) / 3)
    assert backward_transfer(HAND) == pytest.approx((-0.30 + 0.05) / 2)
    assert forgetting(HAND) == pytest.approx(((0.90 - 0.60) + (0.80 - 0.85)) / 2)
    assert forward_transfer(HAND) == pytest.approx(((0.25 - 0.20) + (0.30 - 0.10)) / 2)
    assert retention(HAND, EXPERTS) == pytest.approx((0.10 / 0.45 + 0.65 / 0.55) / 2)
    assert unseen_delta([0.3, 0.4], [0.5, 0.3]) == pytest.approx(0.05)


def test_the_base_counts_as_a_stage_in_forgetting_by_default():
    r = [[0.95, 0.2], [0.90, 0.2], [0.60, 0.9]]
    assert forgetting(r) == pytest.approx(0.35)
    assert forgetting(r, first=1) == pytest.approx(0.30)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_agrees_with_loops_written_from_the_formulas(tasks):
    r = np.random.default_rng(tasks).random((tasks + 1, tasks))
    R = lambda i, j: r[i, j - 1]  # noqa: E731, N806  the paper's indices: stage i, task j from 1
    T = tasks  # noqa: N806
    assert backward_transfer(r) == pytest.approx(sum(R(T, j) - R(j, j) for j in range(1, T)) / (T - 1))
    assert learning_accuracy(r) == pytest.approx(sum(R(j, j) for j in range(1, T + 1)) / T)
    assert forgetting(r) == pytest.approx(sum(max(R(i, j) for i in range(T)) - R(T, j) for j in range(1, T)) / (T - 1))
    assert forward_transfer(r) == pytest.approx(sum(R(j - 1, j) - R(0, j) for j in range(2, T + 1)) / (T - 1))


def test_one_task_has_no_transfer_and_no_forgetting():
    r = [[0.2], [0.8]]
    assert math.isnan(backward_transfer(r))
    assert math.isnan(forgetting(r))
    assert math.isnan(forward_transfer(r))
    assert (average_performance(r), learning_accuracy(r), retention(r, [0.8])) == (0.8, 0.8, 1.0)


def test_an_expert_that_gained_nothing_has_no_share_to_keep():
    assert retention(HAND, EXPERTS) == retention([row[:2] for row in HAND[:2] + HAND[3:]], EXPERTS[:2])
    assert math.isnan(retention([[0.5], [0.9]], [0.5]))
    assert math.isnan(retention([[0.5], [0.9]], [0.4]))


def test_a_score_that_was_not_taken_stays_unknown():
    r = np.array(HAND)
    r[0, 1] = np.nan  # the base was not scored on task 2
    assert math.isnan(forward_transfer(r))
    assert math.isnan(retention(r, EXPERTS))
    r = np.array(HAND)
    r[0, 0] = np.nan
    assert forgetting(r) == pytest.approx(forgetting(HAND)), "the best of the stages that were scored"
    r[:3, 0] = np.nan
    assert math.isnan(forgetting(r))
    r = np.array(HAND)
    r[3, 2] = np.nan
    assert math.isnan(average_performance(r))


def test_all_numbers_have_a_formula_and_come_under_its_name():
    numbers = continual_metrics(HAND, experts=EXPERTS, unseen=([0.3], [0.4]))
    assert list(numbers) == list(METRICS)
    assert numbers["retention"] == retention(HAND, EXPERTS)
    assert numbers["unseen_delta"] == pytest.approx(0.1)
    assert "retention" not in continual_metrics(HAND)


@pytest.mark.parametrize("r", [[[0.1, 0.2]], [[0.1], [0.2], [0.3]], [0.1, 0.2], [[], []]])
def test_a_matrix_of_another_shape_is_refused(r):
    with pytest.raises(ValueError, match=r"R must be \(T \+ 1, T\)"):
        average_performance(r)


def test_scores_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="one expert's score per task"):
        retention(HAND, [0.9, 0.8])
    with pytest.raises(ValueError, match="the same tasks"):
        unseen_delta([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="the same items"):
        item_changes([1, 0], [1])
    with pytest.raises(ValueError, match="at least two choices"):
        item_changes([1, 0], [1, 0], choices=1)


def test_items_that_change_places_are_counted_though_the_mean_stays():
    changes = item_changes([1, 1, 0, 0, 1], [0, 0, 1, 1, 1])
    assert (changes.forgotten, changes.gained, changes.chance) == (0.4, 0.4, 0.0)


def test_items_in_between_count_by_the_part_they_lost():
    changes = item_changes([1.0, 0.5, 0.2], [0.25, 0.5, 0.8])
    assert changes.forgotten == pytest.approx(0.75 / 3)
    assert changes.gained == pytest.approx(0.6 / 3)


def test_chance_is_subtracted_and_nothing_goes_below_zero():
    changes = item_changes([1, 1, 1, 0, 0], [0, 0, 1, 0, 1], choices=4)
    assert changes.chance == pytest.approx((2 / 5) * (3 / 5) / 3)
    assert changes.forgotten == pytest.approx(2 / 5 - 0.08)
    assert changes.gained == pytest.approx(1 / 5 - 0.08)
    assert item_changes([1, 0], [1, 0], choices=2).forgotten == 0.0


def test_choices_may_differ_from_item_to_item():
    before, after = [1, 0, 1, 0, 0], [0, 0, 1, 1, 0]
    by_group = 2 / 5 * (1 / 2 * 2 / 2) / 1 + 3 / 5 * (2 / 3 * 1 / 3) / 3
    assert item_changes(before, after, choices=[2, 2, 4, 4, 4]).chance == pytest.approx(by_group)


def test_guessing_comes_out_as_nothing_forgotten():
    k, n = 4, 200_000
    rng = np.random.default_rng(0)
    before, after = rng.random((2, n)) < 1 / k
    assert item_changes(before, after).forgotten == pytest.approx(3 / 16, abs=0.003)
    assert item_changes(before, after, choices=k).forgotten == pytest.approx(0, abs=0.003)
    knew, knows = rng.random((2, n)) < 0.3  # independently of each other: 1 -> 0 is then lost knowledge, but for guess and guess
    before, after = (np.where(known, 1, rng.random(n) < 1 / k) for known in (knew, knows))
    guessed = (before == 1) & (after == 0) & ~knew & ~knows
    corrected = item_changes(before, after, choices=k)
    assert corrected.forgotten == pytest.approx(item_changes(before, after).forgotten - guessed.mean(), abs=0.003)


def test_the_bootstrap_finds_the_standard_error_of_a_mean():
    values = np.random.default_rng(1).random(400)
    interval = bootstrap(lambda s: float(s[0].mean()), [values], draws=2000)
    stderr = values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * stderr, rel=0.08)
    assert interval.low < interval.estimate < interval.high


def test_the_bootstrap_is_the_same_for_the_same_seed_and_wider_for_a_higher_level():
    values = np.random.default_rng(2).random(50)
    mean = lambda s: float(s[0].mean())  # noqa: E731
    assert bootstrap(mean, [values], seed=3) == bootstrap(mean, [values], seed=3)
    assert bootstrap(mean, [values], seed=3) != bootstrap(mean, [values], seed=4)
    assert bootstrap(mean, [values], level=0.99).low < bootstrap(mean, [values], level=0.9).low


def test_items_stay_paired_over_stages_and_methods():
    rng = np.random.default_rng(3)
    easy = rng.random((1, 200)) < 0.5  # the same items are hard at every stage
    paired = np.repeat(easy, 3, axis=0).astype(float)
    drop = bootstrap(lambda s: float((s[0][2] - s[0][0]).mean()), [paired])
    assert drop == (0.0, 0.0, 0.0), "the same items before and after: no difference in any draw"


def test_an_interval_of_a_metric_of_the_whole_matrix():
    rng = np.random.default_rng(4)
    items = [(rng.random((3, n)) < 0.6).astype(float) for n in (80, 120)]
    r = np.stack([items[0].mean(axis=1), items[1].mean(axis=1)], axis=1)
    assert score_matrix(items) == pytest.approx(r)
    interval = bootstrap(lambda s: backward_transfer(score_matrix(s)), items, draws=300)
    assert interval.estimate == pytest.approx(backward_transfer(r))
    assert interval.low < interval.estimate < interval.high


def test_draws_that_leave_a_statistic_undefined_are_left_out():
    share = lambda s: float(s[0].mean()) if s[0].any() else float("nan")  # noqa: E731
    interval = bootstrap(share, [[0.0, 1.0]], draws=200)  # a quarter of the draws is (0, 0)
    assert interval == (0.5, 0.5, 1.0)


def test_an_undefined_statistic_has_no_interval():
    assert np.isnan(bootstrap(lambda s: float("nan"), [[0.1, 0.2]], draws=10)).all()
    single = bootstrap(lambda s: float(s[0].mean()), [[0.7]])
    assert (single.estimate, math.isnan(single.low), math.isnan(single.high)) == (0.7, True, True)
