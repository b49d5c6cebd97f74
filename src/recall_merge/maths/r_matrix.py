"""R from single scores, and what follows from it: the one place where scores by stage and task become a matrix and its numbers.

The table has the rows of R (0 is the base, i the model after stage i) and, last, each expert's score on its own task. Its first T columns
are the tasks learnt, in order; the others were never trained on.    (T + 2, T + K)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from recall_merge.maths.bootstrap import bootstrap, score_matrix
from recall_merge.maths.metrics import continual_metrics

Array = NDArray[np.float64]


def score_table(
    scores: Mapping[tuple[int, str], float], tasks: Sequence[str], *, experts: Mapping[str, float], unseen: Sequence[str] = ()
) -> Array:
    """The table of scores by (stage, task); NaN where no score was taken.

    >>> score_table({(0, "a"): .2, (1, "a"): .8, (1, "u"): .5}, ["a"], experts={"a": .9}, unseen=["u"])
    array([[0.2, nan],
           [0.8, 0.5],
           [0.9, nan]])
    """
    columns = [*tasks, *unseen]
    rows = [[scores.get((stage, task), math.nan) for task in columns] for stage in range(len(tasks) + 1)]
    own = [experts.get(task, math.nan) for task in tasks] + [math.nan] * len(unseen)
    return np.array([*rows, own], dtype=np.float64)


def table_metrics(table: Array) -> dict[str, float]:
    """The numbers of continual learning, by the names of `metrics.METRICS`; NaN where a score is missing.    (T + 2, T + K)"""
    t = len(table) - 2
    unseen = (table[0, t:], table[t, t:]) if table.shape[1] > t else None
    return continual_metrics(table[: t + 1, :t], experts=table[t + 1, :t], unseen=unseen)


def metric_intervals(items: Sequence[Array], metrics: Mapping[str, float], *, draws: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of numbers over test items, the tasks and their order being given.

    Each interval is moved to its number, which is not that of the items where a score is no mean (BLEU, chrF).

    Args:
        items: the table item by item: for each of its columns (T + 2, n_j), NaN where no score was taken.
        metrics: the numbers, by name.
    """
    intervals: dict[str, tuple[float, float]] = {}
    for name, value in metrics.items():
        interval = bootstrap(lambda samples, name=name: table_metrics(score_matrix(samples))[name], items, draws=draws)
        intervals[name] = (value + interval.low - interval.estimate, value + interval.high - interval.estimate)
    return intervals
