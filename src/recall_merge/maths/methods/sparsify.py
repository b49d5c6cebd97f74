"""Thinning a delta out: which entries stay, and what they are multiplied by.

A function here looks at a whole delta first and returns a `Trim`, which is then given the delta piece by piece, in order. Kept that
way, thinning and merging are one walk over the tensors. Thresholds are found by selection, never by sorting the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import hardshrink

from recall_merge.maths.methods.options import Density
from recall_merge.maths.methods.order import below, kth_largest
from recall_merge.maths.methods.pieces import pieces

Trim = Callable[[Tensor], Tensor]
"""The next piece of a delta -> the same piece with what is dropped set to 0."""
TrimThreshold = tuple[float, float | None]
"""What stays: sizes above the one, and not above the other."""
Kth = Callable[[int], float]
"""k -> the k-th largest size of a delta."""
Stream = Callable[[Sequence[int]], Tensor]
"""A shape -> the next uniform numbers of an expert's stream."""

_WORDS = "multiply what stays: none, by nothing; l1, so that the sum of sizes is as before, over the tensor (as mergekit)"
Rescale = Annotated[Literal["none", "l1"], _WORDS]
RescaleRandom = Annotated[Literal["share", "l1", "none"], _WORDS + "; share, by 1 / the probability of staying (as DARE and DELLA)"]
Gamma = Annotated[float, Interval(ge=0, lt=1), "share of each delta's entries that are outliers, the largest, and dropped"]
Epsilon = Annotated[
    float, Interval(ge=0, lt=1), "the largest entry of a row stays with probability density + epsilon, the smallest with density - epsilon"
]


def keep_largest(delta: Tensor, *, density: Density = 0.2, rescale: Rescale = "none") -> Trim:
    """[delta]_e if |delta_e| >= t else 0, with t the int(density * n)-th largest size (at least the first).

    Entries whose size ties with t all stay: equal entries are treated alike, though then more than the share may stay.

    >>> delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    >>> keep_largest(delta, density=0.5)(delta)
    tensor([ 0., -3.,  2.,  0.])
    """
    low, _ = largest(partial(kth_largest, delta, size=True), delta.numel(), delta.dtype, density=density)
    return _rescaled(lambda: partial(between, low=low), delta, rescale)


def largest(kth: Kth, n: int, dtype: torch.dtype, *, density: float) -> TrimThreshold:
    """The sizes that `keep_largest` keeps of n numbers."""
    return below(kth(_count(density, n)), dtype) if density < 1 else 0.0, None


def keep_middle(delta: Tensor, *, density: Density = 0.1, gamma: Gamma = 0.01, rescale: Rescale = "none") -> Trim:
    """[delta]_e if t_low <= |delta_e| <= t_high else 0: the int(gamma * n) largest go first, then the smallest, until the share is left.

    Where both do not fit (density + gamma > 1), fewer outliers go. Ties with an entry that stays stay.

    >>> delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    >>> keep_middle(delta, density=0.5, gamma=0.25)(delta)
    tensor([1., 0., 2., 0.])
    """
    low, high = middle(partial(kth_largest, delta, size=True), delta.numel(), delta.dtype, density=density, gamma=gamma)
    return _rescaled(lambda: partial(between, low=low, high=high), delta, rescale)


def middle(kth: Kth, n: int, dtype: torch.dtype, *, density: float, gamma: float) -> TrimThreshold:
    """The sizes that `keep_middle` keeps of n numbers."""
    if density >= 1:
        return 0.0, None
    kept = _count(density, n)
    outliers = min(int(gamma * n), n - kept)
    return below(kth(outliers + kept), dtype), kth(outliers + 1)


def drop_random(delta: Tensor, start: Callable[[], Stream], *, density: Density = 0.5, rescale: RescaleRandom = "share") -> Trim:
    """[delta]_e / density with probability density, else 0, each entry on its own (DARE).

    >>> delta = torch.tensor([1.0, 1.0, 1.0])
    >>> drop_random(delta, lambda: lambda shape: torch.tensor([0.1, 0.6, 0.4]), density=0.5)(delta)
    tensor([2., 0., 2.])
    """

    def begin() -> Trim:
        numbers = start()
        factor = 1 / density if rescale == "share" else 1.0
        return lambda piece: piece * _positive(density - numbers(piece.shape)).mul_(factor)

    return _rescaled(begin, delta, rescale)


def drop_by_rank(
    delta: Tensor, start: Callable[[], Stream], *, density: Density = 0.5, epsilon: Epsilon = 0.15, rescale: RescaleRandom = "share"
) -> Trim:
    """[delta]_e / p_e with probability p_e, else 0; in every row p_e rises with the rank of |delta_e| (DELLA's MagPrune).

    p_e = density + epsilon (2 r_e / (n - 1) - 1), r_e = 0 for the smallest of the n entries of a row, n - 1 for the largest.
    epsilon is narrowed to what leaves every p_e in [0, 1], so that density is always the share that stays on average. Rows run along
    the last axis; a vector is one row. Equal entries rank by position. The pieces must be whole rows.
    """
    spread = min(epsilon, density, 1 - density)

    def begin() -> Trim:
        numbers = start()

        def trim(piece: Tensor) -> Tensor:
            stays = density + spread * (2 * _ranks(piece) - 1)
            mask = _positive(stays - numbers(piece.shape))
            return piece * (mask / stays.clamp(min=torch.finfo(stays.dtype).tiny) if rescale == "share" else mask)

        return trim

    return _rescaled(begin, delta, rescale, by_row=True)


def _count(density: float, n: int) -> int:
    return max(1, int(density * n))


def between(piece: Tensor, low: float, high: float | None = None) -> Tensor:
    """What is larger than `low` and, if given, not larger than `high`. x - x is 0 exactly, so the difference of two shrinks is exact."""
    kept = hardshrink(piece, low)
    return kept if high is None else kept.sub_(hardshrink(piece, high))


def _positive(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, in x's own dtype: three times as fast as through a bool tensor."""
    return x.clamp_min_(0).sign_()


def _ranks(piece: Tensor) -> Tensor:
    """Ranks of sizes within each row, from 0 (smallest) to 1; 1/2 in a row of one.    (r, n) -> (r, n)

    Size and position are packed into one integer, sizes in float32: a sort of integers without ties gives the same ranks everywhere.
    """
    n = piece.shape[-1]
    if n == 1:
        return torch.full_like(piece, 0.5)
    keys = piece.abs().float().contiguous().numpy().view(np.int32).astype(np.int64) << 32
    keys |= np.arange(n)
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF  # positions, from the smallest entry of each row to its largest
    ranks = torch.linspace(0, 1, n, dtype=piece.dtype).expand(piece.shape)
    return torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(-1, torch.from_numpy(keys), ranks)


def _rescaled(begin: Callable[[], Trim], delta: Tensor, rescale: str, *, by_row: bool = False) -> Trim:
    """A trim from its start; for l1 after a first walk that measures what it keeps."""
    if rescale != "l1":
        return begin()
    trim = begin()
    before, after = 0.0, 0.0
    for (piece,) in pieces(delta, by_row=by_row):
        before += float(piece.abs().sum())
        after += float(trim(piece).abs_().sum())
    factor = before / after if after else 1.0
    again = begin()
    return lambda piece: again(piece).mul_(factor)


THRESHOLDS: dict[Callable[..., Trim], Callable[..., TrimThreshold]] = {keep_largest: largest, keep_middle: middle}
"""The trims that need to know no more of a delta than a band of sizes."""
