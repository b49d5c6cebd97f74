"""Bootstrap intervals, of any statistic and of the metrics over test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray

from recall_merge.maths.metrics import table_metrics

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the bounds of its bootstrap interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[list[Array]], float], samples: Sequence[ArrayLike], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of any statistic (Efron 1979).

    samples: arrays (..., n_s); the last axis of each is resampled with replacement, every array on its own. Over items, samples[j] has
    task j's scores, (T + 1, n_j), for a metric of `score_matrix(samples)`: an item stays paired with itself over the stages. Over orders
    or seeds, it is one array (n,) of values for their mean; two methods on the same orders are (2, n), so paired.
    The bounds are the (1 - level) / 2 and (1 + level) / 2 quantiles over the draws (Philox, keyed by the seed). Draws where the
    statistic is NaN are left out. Arrays of one item each give no bounds: NaN.

    >>> bootstrap(lambda s: float(s[0].mean()), [[0.7]])
    Interval(estimate=0.7, low=nan, high=nan)
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    estimate = float(statistic(arrays))
    unknown = Interval(estimate, float("nan"), float("nan"))
    if max((array.shape[-1] for array in arrays), default=0) < 2:
        return unknown
    rng = np.random.Generator(np.random.Philox(key=seed))
    resamples = ([a[..., rng.integers(a.shape[-1], size=a.shape[-1])] for a in arrays] for _ in range(draws))
    values = np.array([statistic(resample) for resample in resamples])
    values = values[~np.isnan(values)]
    if not values.size:
        return unknown
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def score_matrix(items: Sequence[Array]) -> Float64[np.ndarray, "stages T"]:
    """R from single items: the mean of each task's items at each stage.    T arrays of (T + 1, n_j) -> (T + 1, T)

    For corpus metrics (BLEU, chrF) the mean over sentences is only near the score: good for an interval's width, not for its middle.

    >>> score_matrix([np.array([[0., 1.], [1., 1.]])])
    array([[0.5],
           [1. ]])
    """
    return np.stack([np.asarray(task, dtype=np.float64).mean(axis=-1) for task in items], axis=1)


def metric_intervals(items: Sequence[Array], metrics: Mapping[str, float], *, draws: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of numbers over test items, the tasks and their order being given.

    items: a `score_table` item by item, for each of its columns (T + 2, n_j), NaN where no score was taken.
    Each interval is moved to its number, which is not that of the items where a score is no mean (BLEU, chrF).
    """
    intervals: dict[str, tuple[float, float]] = {}
    for name, value in metrics.items():
        interval = bootstrap(lambda samples, name=name: table_metrics(score_matrix(samples))[name], items, draws=draws)
        intervals[name] = (value + interval.low - interval.estimate, value + interval.high - interval.estimate)
    return intervals
