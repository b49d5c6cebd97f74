"""Single test items that were forgotten or gained between two stages, corrected for guessing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


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
