"""The numbers of continual learning: what a matrix of scores says was learnt, kept, forgotten and generalised.

Throughout, R is the matrix of scores: R[i, j] = score on task j after stage i. Stage 0 is the base, stage j is the one that learns
task j, T is the number of tasks, and b_j = R[0, j]. As an array R is (T + 1, T): row i is stage i, column j - 1 is task j.
A score that was never taken is NaN; a number that needs it is NaN, except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A number of continual learning, and how tables and pages print it.

    Attributes:
        label: its name in words.
        short: its name in a narrow table.
        formula: what is averaged over what: formula, denominator and variant. Print it wherever the number is printed.
        signed: it is a difference of scores, so that its sign matters.
        needs_stages: it needs scores after each stage, not only at the end.
    """

    label: str
    short: str
    formula: str
    signed: bool = False
    needs_stages: bool = False


METRICS = {
    "average_performance": Metric("average performance", "AP", "mean over all T tasks of R[T, j]"),
    "learning_accuracy": Metric("learning accuracy", "learning accuracy", "mean over all T tasks of R[j, j]", needs_stages=True),
    "backward_transfer": Metric(
        "backward transfer", "BWT", "sum over j < T of R[T, j] - R[j, j], divided by T - 1", signed=True, needs_stages=True
    ),
    "forgetting": Metric(
        "forgetting",
        "forgetting",
        "mean over the T - 1 tasks j < T of max over stages i < T (base included) of R[i, j], less R[T, j]",
        signed=True,
        needs_stages=True,
    ),
    "forward_transfer": Metric(
        "forward transfer",
        "FWT",
        "mean over the T - 1 tasks j >= 2 of R[j-1, j] - b_j, b_j the base's score",
        signed=True,
        needs_stages=True,
    ),
    "retention": Metric(
        "retention of the experts' gains",
        "retention",
        "mean over the tasks whose expert beats the base of (R[T, j] - b_j) / (E_j - b_j), E_j the expert's own score",
    ),
    "unseen_delta": Metric(
        "unseen-task delta", "unseen delta", "mean over the K tasks not trained on of R[T, k] - b_k, b_k the base's score", signed=True
    ),
}
"""The numbers of `continual_metrics`, by name."""

FORMULAS = {name: metric.formula for name, metric in METRICS.items()}


def continual_metrics(
    scores: ArrayLike, *, experts: ArrayLike | None = None, unseen: tuple[ArrayLike, ArrayLike] | None = None
) -> dict[str, float]:
    """All numbers that the given scores allow, by the names of `METRICS`.

    scores is R, (T + 1, T); experts holds E_j, (T,); unseen = (base's scores, final scores), (K,) each, on tasks never trained on.

    >>> numbers = continual_metrics([[.2, .4], [.8, .5], [.6, .9]], experts=[.8, .9])
    >>> for name, value in numbers.items(): print(f"{name} {value:.3f}")
    average_performance 0.750
    learning_accuracy 0.850
    backward_transfer -0.200
    forgetting 0.200
    forward_transfer 0.100
    retention 0.833
    """
    r = as_matrix(scores)
    numbers = {
        "average_performance": average_performance(r),
        "learning_accuracy": learning_accuracy(r),
        "backward_transfer": backward_transfer(r),
        "forgetting": forgetting(r),
        "forward_transfer": forward_transfer(r),
    }
    if experts is not None:
        numbers["retention"] = retention(r, experts)
    if unseen is not None:
        numbers["unseen_delta"] = unseen_delta(*unseen)
    return numbers


def as_matrix(scores: ArrayLike) -> Array:
    """R as a float64 array, refused unless it is (T + 1, T) with T >= 1."""
    r = np.asarray(scores, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 1 or r.shape[0] != r.shape[1] + 1:
        raise ValueError(f"R must be (T + 1, T), the base's row and then one row a stage; this is {r.shape}")
    return r


def average_performance(scores: ArrayLike) -> float:
    """Mean score over all tasks at the end: mean_j R[T, j], over T tasks.    R (T + 1, T)

    >>> average_performance([[.2, .4], [.8, .5], [.6, .9]])    # (.6 + .9) / 2
    0.75
    """
    return _mean(as_matrix(scores)[-1])


def learning_accuracy(scores: ArrayLike) -> float:
    """Mean score on each task just after it was learnt: mean_j R[j, j], over T tasks (Riemer et al. 2019).    R (T + 1, T)

    >>> round(learning_accuracy([[.2, .4], [.8, .5], [.6, .9]]), 3)    # (.8 + .9) / 2
    0.85
    """
    return _mean(_just_learnt(as_matrix(scores)))


def backward_transfer(scores: ArrayLike) -> float:
    """What later stages did to earlier tasks: sum_{j<T} (R[T, j] - R[j, j]) / (T - 1); below 0 is loss.    R (T + 1, T)

    Lopez-Paz & Ranzato 2017. The last task is left out, since nothing came after it; some libraries divide by T instead, which
    brings the number nearer 0. With one task there is no earlier one: NaN.

    >>> round(backward_transfer([[.2, .4], [.8, .5], [.6, .9]]), 3)    # .6 - .8
    -0.2
    """
    r = as_matrix(scores)
    return _mean((r[-1] - _just_learnt(r))[:-1])


def forgetting(scores: ArrayLike, *, first: int = 0) -> float:
    """How far each earlier task is below its best: mean_{j<T} ( max_{first <= i < T} R[i, j] - R[T, j] ).    R (T + 1, T)

    Over T - 1 tasks, the last left out; below 0 where tasks are best at the end. `first=0` counts the base among the stages, so
    that what the base could do and the end cannot is forgotten too; Chaudhry et al. 2018 have no base in R: `first=1`.
    The maximum is over the stages that were scored, since a task's test rows may not exist before the task. With one task: NaN.

    >>> round(forgetting([[.9, .4], [.8, .5], [.6, .9]]), 3)    # max(.9, .8) - .6
    0.3
    >>> round(forgetting([[.9, .4], [.8, .5], [.6, .9]], first=1), 3)    # .8 - .6
    0.2
    """
    r = as_matrix(scores)
    earlier = r[first:-1, :-1]  # (stages, T - 1)
    if not earlier.size:
        return float("nan")
    best = np.where(np.isnan(earlier), -np.inf, earlier).max(axis=0)
    return _mean(np.where(np.isinf(best), np.nan, best) - r[-1, :-1])


def forward_transfer(scores: ArrayLike) -> float:
    """What earlier stages did for a task before it was learnt: mean_{j>=2} ( R[j-1, j] - b_j ), over T - 1 tasks.    R (T + 1, T)

    Lopez-Paz & Ranzato 2017, with the base in place of a random model. "Forward transfer" is also the name of a gain in the speed
    of learning (Wolczyk et al. 2021): another quantity. With one task: NaN.

    >>> round(forward_transfer([[.2, .4], [.8, .5], [.6, .9]]), 3)    # .5 - .4
    0.1
    """
    r = as_matrix(scores)
    return _mean((np.diagonal(r) - r[0])[1:])  # the diagonal from the base's row on: each task one stage before it was learnt


def retention(scores: ArrayLike, experts: ArrayLike) -> float:
    """Share of the experts' gains that the end still has: mean_j ( R[T, j] - b_j ) / ( E_j - b_j ).    R (T + 1, T), experts (T,)

    1 = as good as every expert on its own task, 0 = no better than the base. Over the tasks whose expert beats the base: where it
    does not, there is no gain to keep a share of. NaN when no expert beats the base.

    >>> round(retention([[.2, .4], [.8, .5], [.6, .9]], [.8, .9]), 3)    # (.4 / .6 + .5 / .5) / 2
    0.833
    """
    shares = retained(scores, experts)
    no_gain = np.asarray(experts, dtype=np.float64) <= as_matrix(scores)[0]
    return _mean(shares[~no_gain])  # subtle: a share that is NaN because a score is missing stays in, and makes the mean NaN


def retained(scores: ArrayLike, experts: ArrayLike) -> Array:
    """The share of each task's gain: ( R[T, j] - b_j ) / ( E_j - b_j ), NaN where E_j <= b_j.    R (T + 1, T), experts (T,) -> (T,)

    >>> retained([[.25, .5], [.75, .5], [.5, 1]], [.75, .5])    # .25 / .5; the second expert is no better than the base
    array([0.5, nan])
    """
    r, own = as_matrix(scores), np.asarray(experts, dtype=np.float64)
    if own.shape != (r.shape[1],):
        raise ValueError(f"there must be one expert's score a task: R has {r.shape[1]} tasks, the experts' scores are {own.shape}")
    gain = own - r[0]
    return (r[-1] - r[0]) / np.where(gain > 0, gain, np.nan)


def unseen_delta(base: ArrayLike, final: ArrayLike) -> float:
    """What the work did to tasks that no expert was trained on: mean_k R[T, k] - b_k, over K tasks.    base (K,), final (K,)

    >>> round(unseen_delta([.3, .5], [.4, .6]), 3)
    0.1
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(final, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"the base and the end must be scored on the same tasks: {before.shape} and {after.shape}")
    return _mean(after - before)


class ItemChanges(NamedTuple):
    """What happened to single test items between two stages, as shares of all items."""

    forgotten: float
    """1 -> 0, less what chance would give."""
    gained: float
    """0 -> 1, less what chance would give."""
    chance: float
    """What chance would give of either; it is subtracted."""


def item_changes(before: ArrayLike, after: ArrayLike, *, choices: ArrayLike | None = None) -> ItemChanges:
    """Per-item forgetting and backward transfer: the shares of items that went 1 -> 0 and 0 -> 1 (Harmon et al. 2025, arXiv:2510.17776).

    before, after: right (1) or wrong (0) for the same n items at two stages, (n,). A mean hides items that change places: .5 -> .5
    may be nothing lost, or all of it lost and replaced. Items scored in between (token F1) count by the part of a point that they
    lost or won, which is the same thing for 0 and 1 (ours).

    choices: how many answers an item offers, one number or (n,). A model that knows a share p and guesses the rest is right on
    a = p + (1 - p) / k, so 1 - p = (1 - a) k / (k - 1). An item guessed both times goes 1 -> 0, or 0 -> 1, with chance
    (1/k) (1 - 1/k), so guessing alone gives of either

        (1 - p) (1 - p') (k - 1) / k^2  =  (1 - a) (1 - a') / (k - 1)

    which is subtracted; below 0 is set to 0. It takes guesses, and what is known, to be independent at the two stages: where both
    know the same items it takes off too little. Items with different k are corrected by group, each group counting by its size
    (ours). None = nothing to guess from: nothing is subtracted.

    >>> item_changes([1, 1, 0, 0], [0, 1, 1, 0])    # one of four each way
    ItemChanges(forgotten=0.25, gained=0.25, chance=0.0)
    >>> lost, won, chance = item_changes([1, 1, 1, 0, 0], [0, 0, 1, 0, 1], choices=4)
    >>> f"{chance:.2f} {lost:.2f} {won:.2f}"    # (1 - 3/5) (1 - 2/5) / 3;  2/5 and 1/5 less that
    '0.08 0.32 0.12'
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.ndim != 1 or old.shape != new.shape or not old.size:
        raise ValueError(f"two stages are compared on the same items, and at least one: {old.shape} and {new.shape}")
    chance = 0.0
    if choices is not None:
        offered = np.broadcast_to(np.asarray(choices), old.shape)
        if (offered < 2).any():
            raise ValueError("an item must offer at least two choices")
        for k in np.unique(offered):
            same = offered == k
            chance += float(same.mean() * (1 - old[same].mean()) * (1 - new[same].mean()) / (k - 1))
    lost, won = np.maximum(old - new, 0).mean(), np.maximum(new - old, 0).mean()
    return ItemChanges(max(0.0, float(lost) - chance), max(0.0, float(won) - chance), chance)


class Interval(NamedTuple):
    """An estimate and the bounds of its bootstrap interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[list[Array]], float],
    samples: Sequence[ArrayLike],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of any statistic (Efron 1979).

    samples: arrays (..., n_s). The last axis of each is drawn again with replacement, every array on its own:
      over items   samples[j] = the scores of task j's items at every stage, (T + 1, n_j), and the statistic a metric of
                   `score_matrix(samples)`; an item stays paired with itself over the stages, and the tasks are kept;
      over orders  one array of values, (n,), and the statistic its mean; two methods on the same orders are (2, n), so paired.
      (or seeds)
    The bounds are the (1 - level) / 2 and (1 + level) / 2 quantiles of the statistic over the draws (Philox, keyed by the seed);
    draws that leave it undefined (NaN) are left out. With a single thing to draw from, nothing is known: NaN bounds.

    >>> bootstrap(lambda s: float(s[0].mean()), [[0.5, 0.5, 0.5]])
    Interval(estimate=0.5, low=0.5, high=0.5)
    >>> bootstrap(lambda s: float(s[0].mean()), [[0.7]])
    Interval(estimate=0.7, low=nan, high=nan)
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    estimate = float(statistic(arrays))
    unknown = Interval(estimate, float("nan"), float("nan"))
    if max((array.shape[-1] for array in arrays), default=0) < 2:
        return unknown
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = ([a[..., rng.integers(a.shape[-1], size=a.shape[-1])] for a in arrays] for _ in range(draws))
    values = np.array([statistic(again) for again in drawn])
    values = values[~np.isnan(values)]
    if not values.size:
        return unknown
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def score_matrix(items: Sequence[Array]) -> Array:
    """R from the items: the mean of each task's items at each stage.    T arrays of (T + 1, n_j) -> (T + 1, T)

    For a metric of the whole corpus (BLEU, chrF) the mean over sentences is not the score, only near it: fit for the width of an
    interval, not for the number in its middle.

    >>> score_matrix([np.array([[0., 1.], [1., 1.]])])
    array([[0.5],
           [1. ]])
    """
    return np.stack([np.asarray(task, dtype=np.float64).mean(axis=-1) for task in items], axis=1)


def _just_learnt(r: Array) -> Array:
    """R[j, j] for every task.    (T + 1, T) -> (T,)"""
    return np.diagonal(r[1:])


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
