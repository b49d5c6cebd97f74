"""R from single scores: rows are stages, columns tasks, and the numbers are those of `metrics`."""

import math

import numpy as np
import pytest

from recall_merge.maths.metrics import continual_metrics
from recall_merge.maths.r_matrix import metric_intervals, score_table, table_metrics

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


def test_an_interval_lies_around_its_own_number():
    items = [np.tile([0.0, 1.0] * 20, (3, 1))]
    [(low, high)] = metric_intervals(items, {"average_performance": 0.7}, draws=50).values()
    assert low < 0.7 < high and high - low < 0.5
