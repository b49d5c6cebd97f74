"""Bootstrap intervals: known standard errors, pairing, seeds, and statistics that are not defined."""

import math

import numpy as np
import pytest

from recall_merge.maths.bootstrap import bootstrap, metric_intervals, score_matrix
from recall_merge.maths.metrics import backward_transfer


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


def test_an_interval_lies_around_its_own_number():
    items = [np.tile([0.0, 1.0] * 20, (3, 1))]
    [(low, high)] = metric_intervals(items, {"average_performance": 0.7}, draws=50).values()
    assert low < 0.7 < high and high - low < 0.5
