"""The numbers of continual learning: a matrix worked by hand, loops written from the formulas, and what is undefined."""

import math

import numpy as np
import pytest

from recall_merge.maths.metrics import (
    METRICS,
    average_performance,
    backward_transfer,
    continual_metrics,
    forgetting,
    forward_transfer,
    learning_accuracy,
    retention,
    score_table,
    table_metrics,
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


#        a    b    u
# base  .1   .2   .5
# 1     .8    -    -
# 2     .6   .7   .4
SCORES = {(0, "a"): 0.1, (0, "b"): 0.2, (0, "u"): 0.5, (1, "a"): 0.8, (2, "a"): 0.6, (2, "b"): 0.7, (2, "u"): 0.4}


def test_a_table_by_hand():
    table = score_table(SCORES, ["a", "b"], experts={"a": 0.9, "b": 0.8}, unseen=["u"])
    nan = math.nan
    assert np.array_equal(table, [[0.1, 0.2, 0.5], [0.8, nan, nan], [0.6, 0.7, 0.4], [0.9, 0.8, nan]], equal_nan=True)
    metrics = table_metrics(table)
    assert metrics["unseen_delta"] == pytest.approx(-0.1)
    assert metrics["retention"] == pytest.approx((0.5 / 0.8 + 0.5 / 0.6) / 2)
    assert metrics == pytest.approx(continual_metrics(table[:3, :2], experts=[0.9, 0.8], unseen=([0.5], [0.4])), nan_ok=True)
    assert "unseen_delta" not in table_metrics(score_table(SCORES, ["a", "b"], experts={}))
