"""The numbers of continual learning: what was learnt, kept, forgotten and transferred, from a matrix of scores.

R[i, j] is the score on task j after stage i. Stage 0 is the base, stage j learns task j; T is the number of tasks, b_j = R[0, j].
As an array R is (T + 1, T): row i is stage i, column j - 1 is task j. A score that was not taken is NaN, and so is a number that
needs it, except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Metric:
    """A number of continual learning, and how tables and pages print it: by name, or in a narrow table by a short name."""

    label: str
    short: str
    formula: str
    """With denominator and variant; print it wherever the number is printed, since libraries differ."""
    signed: bool = False
    """It is a difference of scores."""
    needs_stages: bool = False
    """It needs scores after every stage, not only at the end."""


METRICS = {
    "average_performance": Metric("average performance", "AP", "mean over all T tasks of R[T, j]"),
    "learning_accuracy": Metric("learning accuracy", "learning accuracy", "mean over all T tasks of R[j, j]", needs_stages=True),
    "backward_transfer": Metric(
        "backward transfer", "BWT", "sum over j < T of R[T, j] - R[j, j], divided by T - 1", signed=True, needs_stages=True
    ),
    "forgetting": Metric(
        "forgetting",
        "forgetting",
        "mean over T - 1 tasks j < T of max over i < T (base included) of R[i, j], minus R[T, j]",
        signed=True,
        needs_stages=True,
    ),
    "forward_transfer": Metric(
        "forward transfer", "FWT", "mean over T - 1 tasks j >= 2 of R[j-1, j] - b_j, b_j the base's score", signed=True, needs_stages=True
    ),
    "retention": Metric(
        "retention of the experts' gains",
        "retention",
        "mean over the tasks whose expert beats the base of (R[T, j] - b_j) / (E_j - b_j), E_j the expert's own score",
    ),
    "unseen_delta": Metric(
        "unseen-task delta", "unseen delta", "mean over K tasks not trained on of R[T, k] - b_k, b_k the base's score", signed=True
    ),
}


def continual_metrics(
    scores: ArrayLike, *, experts: ArrayLike | None = None, unseen: tuple[ArrayLike, ArrayLike] | None = None
) -> dict[str, float]:
    """All numbers that the scores allow, by the names of `METRICS`, which are those of the functions.    R (T + 1, T)

    experts: E_j, each expert's score on its own task, (T,). unseen: scores of base and final model on tasks not trained on, (K,) each.
    """
    r = as_matrix(scores)
    always = (average_performance, learning_accuracy, backward_transfer, forgetting, forward_transfer)
    numbers = {metric.__name__: metric(r) for metric in always}
    if experts is not None:
        numbers["retention"] = retention(r, experts)
    if unseen is not None:
        numbers["unseen_delta"] = unseen_delta(*unseen)
    return numbers


LARGEST = 1e100  # of a score; anything beyond is damage, and counts as not taken


def score_table(
    scores: Mapping[tuple[int, str], float], tasks: Sequence[str], *, experts: Mapping[str, float], unseen: Sequence[str] = ()
) -> NDArray[np.float64]:
    """Scores by (stage, task) as a table, NaN where none was taken: the rows of R and, last, each expert's score on its own task.

    Its first T columns are the tasks learnt, in order; the others, `unseen`, were never trained on.    (T + 2, T + K)

    >>> score_table({(0, "a"): .2, (1, "a"): .8, (1, "u"): .5}, ["a"], experts={"a": .9}, unseen=["u"])
    array([[0.2, nan],
           [0.8, 0.5],
           [0.9, nan]])
    """
    columns = [*tasks, *unseen]
    rows = [[scores.get((stage, task), np.nan) for task in columns] for stage in range(len(tasks) + 1)]
    own = [experts.get(task, np.nan) for task in tasks] + [np.nan] * len(unseen)
    table = np.array([*rows, own], dtype=np.float64)
    return np.where(np.abs(table) < LARGEST, table, np.nan)


def is_score(number: float) -> bool:
    """Whether a number can be a score: neither NaN nor infinite, nor so large that means of it overflow."""
    return abs(number) < LARGEST


def table_metrics(table: NDArray[np.float64]) -> dict[str, float]:
    """The numbers of continual learning, from a `score_table` (T + 2, T + K); NaN where a score is missing."""
    t = len(table) - 2
    unseen = (table[0, t:], table[t, t:]) if table.shape[1] > t else None
    return continual_metrics(table[: t + 1, :t], experts=table[t + 1, :t], unseen=unseen)


def as_matrix(scores: ArrayLike) -> Float64[np.ndarray, "stages T"]:
    """R as an array; refused unless it is (T + 1, T) with T >= 1."""
    r = np.asarray(scores, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 1 or r.shape[0] != r.shape[1] + 1:
        raise ValueError(f"R must be (T + 1, T), the base's row and then one row per stage; this is {r.shape}")
    return r


def average_performance(scores: ArrayLike) -> float:
    """Mean score over all tasks at the end: mean_j R[T, j], over T tasks.    R (T + 1, T)

    >>> average_performance([[.2, .4], [.8, .5], [.6, .9]])    # (.6 + .9) / 2
    0.75
    """
    return _mean(as_matrix(scores)[-1])


def learning_accuracy(scores: ArrayLike) -> float:
    """Mean score on each task right after it was learnt: mean_j R[j, j], over T tasks (Riemer et al. 2019).    R (T + 1, T)

    >>> round(learning_accuracy([[.2, .4], [.8, .5], [.6, .9]]), 3)    # (.8 + .9) / 2
    0.85
    """
    return _mean(np.diagonal(as_matrix(scores)[1:]))


def backward_transfer(scores: ArrayLike) -> float:
    """Effect of later stages on earlier tasks: sum_{j<T} (R[T, j] - R[j, j]) / (T - 1); below 0 is loss.    R (T + 1, T)

    Lopez-Paz & Ranzato 2017. Nothing came after the last task, so it is left out; some libraries divide by T. NaN for one task.

    >>> round(backward_transfer([[.2, .4], [.8, .5], [.6, .9]]), 3)    # .6 - .8
    -0.2
    """
    r = as_matrix(scores)
    return _mean((r[-1] - np.diagonal(r[1:]))[:-1])


def forgetting(scores: ArrayLike, *, first: int = 0) -> float:
    """How far each earlier task is below its best: mean_{j<T} ( max_{first <= i < T} R[i, j] - R[T, j] ).    R (T + 1, T)

    Over T - 1 tasks, the last left out; below 0 where tasks are best at the end. `first=0` counts the base as a stage, so that lost
    abilities of the base are forgotten too; Chaudhry et al. 2018 have no base in R: `first=1`. The maximum is over the stages that
    were scored, since a task's test rows may not exist before the task. NaN for one task.

    >>> round(forgetting([[.9, .4], [.8, .5], [.6, .9]]), 3)    # max(.9, .8) - .6
    0.3
    """
    r = as_matrix(scores)
    earlier = r[first:-1, :-1]  # (stages, T - 1)
    if not earlier.size:
        return float("nan")
    best = np.where(np.isnan(earlier), -np.inf, earlier).max(axis=0)
    return _mean(np.where(np.isinf(best), np.nan, best) - r[-1, :-1])


def forward_transfer(scores: ArrayLike) -> float:
    """Effect of earlier stages on a task before it is learnt: mean_{j>=2} ( R[j-1, j] - b_j ), over T - 1 tasks.    R (T + 1, T)

    Lopez-Paz & Ranzato 2017, with the base for a random model; Wolczyk et al. 2021 mean the gain in learning speed. NaN for one task.

    >>> round(forward_transfer([[.2, .4], [.8, .5], [.6, .9]]), 3)    # .5 - .4
    0.1
    """
    r = as_matrix(scores)
    return _mean((np.diagonal(r) - r[0])[1:])  # the diagonal from the base's row on: each task one stage before it was learnt


def retention(scores: ArrayLike, experts: ArrayLike) -> float:
    """Share of the experts' gains that is left at the end: mean_j ( R[T, j] - b_j ) / ( E_j - b_j ).    R (T + 1, T), experts (T,)

    1 = as good as every expert on its own task, 0 = no better than the base. Over the tasks whose expert beats the base; NaN if none.

    >>> round(retention([[.2, .4], [.8, .5], [.6, .9]], [.8, .9]), 3)    # (.4 / .6 + .5 / .5) / 2
    0.833
    """
    r, own = as_matrix(scores), np.asarray(experts, dtype=np.float64)
    if own.shape != (r.shape[1],):
        raise ValueError(f"there must be one expert's score per task: R has {r.shape[1]} tasks, the experts' scores are {own.shape}")
    gains = own - r[0]
    counted = ~(gains <= 0)  # subtle: a gain that is NaN because a score is missing counts, and makes the mean NaN
    return _mean((r[-1] - r[0])[counted] / gains[counted])


def unseen_delta(base: ArrayLike, final: ArrayLike) -> float:
    """Change on tasks that no expert was trained on: mean_k R[T, k] - b_k, over K tasks.    base (K,), final (K,)

    >>> round(unseen_delta([.3, .5], [.4, .6]), 3)
    0.1
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(final, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"base and final model must be scored on the same tasks: {before.shape} and {after.shape}")
    return _mean(after - before)


class ItemChanges(NamedTuple):
    """Shares of all test items: 1 -> 0 and 0 -> 1, both minus `chance`, which guessing alone would give to either."""

    forgotten: float
    gained: float
    chance: float


def item_changes(before: ArrayLike, after: ArrayLike, *, choices: ArrayLike | None = None) -> ItemChanges:
    """Per-item forgetting and backward transfer: the shares of items that went 1 -> 0 and 0 -> 1 (Harmon et al. 2025, arXiv:2510.17776).

    The mean hides items that change places: .5 -> .5 may be nothing lost, or everything lost and replaced.

    Args:
        before, after: right (1) or wrong (0) for the same n items at two stages, (n,). Scores in between (token F1) count in part (ours).
        choices: the number of answers that an item offers, one number or (n,); None if there is nothing to guess from.

    A model that knows a share p and guesses the rest is right on a = p + (1 - p) / k, so 1 - p = (1 - a) k / (k - 1). An item guessed
    at both stages goes 1 -> 0, or 0 -> 1, with probability (1/k) (1 - 1/k), so guessing alone gives of either
        (1 - p) (1 - p') (k - 1) / k^2  =  (1 - a) (1 - a') / (k - 1)
    which is subtracted, down to 0. This takes guesses and knowledge as independent between the stages; where both stages know the same
    items, it subtracts too little. Items with different k are corrected in groups, weighted by size (ours).

    >>> lost, won, chance = item_changes([1, 1, 1, 0, 0], [0, 0, 1, 0, 1], choices=4)
    >>> f"{chance:.2f} {lost:.2f} {won:.2f}"    # (1 - 3/5) (1 - 2/5) / 3;  2/5 and 1/5 minus that
    '0.08 0.32 0.12'
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.ndim != 1 or old.shape != new.shape or not old.size:
        raise ValueError(f"two stages are compared on the same items, at least one: {old.shape} and {new.shape}")
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


def none_if_nan(value: float) -> float | None:
    """A number for JSON."""
    return None if np.isnan(value) else value


def _mean(values: Float64[np.ndarray, " k"]) -> float:
    return float(values.mean()) if values.size else float("nan")
