"""Trim deltas: which entries stay, and what they are multiplied by.

A trim looks at a whole delta first (a threshold on sizes, a rescaling factor) and returns a `Trim`, which then takes the delta piece by
piece, in order. That buys time: trimming, electing and averaging are one pass in the processor's cache, and thresholds are found by
selection, without a sort. And memory: where all that a trim needs is a threshold on sizes (`TrimThreshold`), the caller may find it
first, span by span from the file, and then merge span by span; no tensor is ever whole in memory, and the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from recall_merge.maths.draws import Stream
from recall_merge.maths.order_statistics import below, kth_largest
from recall_merge.maths.pieces import in_pieces, pieces

Trim = Callable[[Tensor], Tensor]
"""The next piece of a delta -> the same piece with what is dropped set to 0."""
TrimThreshold = tuple[float, float | None]
"""What stays: sizes above the first number and, if there is a second, not above that one."""
Kth = Callable[[int], float]
"""k -> the k-th largest size of a delta."""
Rescale = Literal["none", "l1"]
"""Multiply what stays by nothing (none), or so that the sum of sizes over the tensor is as before (l1)."""
RescaleRandom = Literal["share", "l1", "none"]
"""The same; or by 1 / the probability of staying (share)."""


def per_expert(deltas: Sequence[Float[Tensor, "*s"]], *options: Any) -> Iterator[tuple[Any, ...]]:
    """Each delta with its values of the options: a list holds one value per expert, anything else holds for all."""
    for expert, delta in enumerate(deltas):
        yield delta, *(value_for(option, expert) for option in options)


def value_for(option: Any, expert: int) -> Any:
    return option[expert] if isinstance(option, list) else option


def add_trimmed(
    base: Float[Tensor, "*s"],
    deltas: Sequence[Float[Tensor, "*s"]],
    trims: Sequence[Trim],
    combine: Callable[[Sequence[Tensor]], Tensor],
    scale: float,
    *,
    by_row: bool = False,
) -> Float[Tensor, "*s"]:
    """theta_0 + scale * combine(v_1 .. v_k), v_q = trim_q(delta_q), in pieces.

    >>> add_trimmed(torch.zeros(2), [torch.tensor([1.0, 5.0])], [partial(between, low=2.0)], lambda kept: kept[0], scale=2.0)
    tensor([ 0., 10.])
    """

    def merged(piece: Tensor, *parts: Tensor) -> Tensor:
        kept = [trim(part) for trim, part in zip(trims, parts, strict=True)]
        return torch.add(piece, combine(kept), alpha=scale)

    return in_pieces(merged, [base, *deltas], by_row=by_row)


def keep_largest(
    delta: Float[Tensor, "*s"], *, density: float, rescale: Rescale = "none", threshold: TrimThreshold | None = None
) -> Trim:  # fmt: skip
    """[delta]_e if |delta_e| >= t else 0, with t the int(density * n)-th largest size (at least the first).

    Entries whose size ties with t all stay, so more than the share may stay: equal entries are treated alike.

    >>> delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    >>> keep_largest(delta, density=0.5)(delta)
    tensor([ 0., -3.,  2.,  0.])
    """
    low, high = threshold or threshold_of_largest(partial(kth_largest, delta, size=True), delta.numel(), delta.dtype, density)
    return _rescaled(lambda: partial(between, low=low, high=high), delta, rescale)


def threshold_of_largest(kth: Kth, n: int, dtype: torch.dtype, density: float) -> TrimThreshold:
    """The sizes that `keep_largest` keeps of n numbers."""
    if density >= 1 or not n:
        return 0.0, None
    return below(kth(_count(density, n)), dtype), None


def keep_middle(
    delta: Float[Tensor, "*s"], *, density: float, gamma: float, rescale: Rescale = "none", threshold: TrimThreshold | None = None
) -> Trim:
    """[delta]_e if t_low <= |delta_e| <= t_high else 0: the int(gamma * n) largest go first, then the smallest, until the share is left.

    Where both do not fit (density + gamma > 1), fewer of the largest go. Entries that tie with one that stays stay too.

    >>> delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    >>> keep_middle(delta, density=0.5, gamma=0.25)(delta)
    tensor([1., 0., 2., 0.])
    """
    low, high = threshold or threshold_of_middle(partial(kth_largest, delta, size=True), delta.numel(), delta.dtype, density, gamma)
    return _rescaled(lambda: partial(between, low=low, high=high), delta, rescale)


def threshold_of_middle(kth: Kth, n: int, dtype: torch.dtype, density: float, gamma: float) -> TrimThreshold:
    """The sizes that `keep_middle` keeps of n numbers."""
    if density >= 1 or not n:
        return 0.0, None
    kept = _count(density, n)
    outliers = min(int(gamma * n), n - kept)
    return below(kth(outliers + kept), dtype), kth(outliers + 1)


def between(piece: Float[Tensor, "*s"], low: float, high: float | None = None) -> Float[Tensor, "*s"]:
    """[x]_e if low < |x_e| (<= high, if given) else 0. x - x is 0 exactly, so the difference of two shrinks is exact."""
    kept = hardshrink(piece, low)
    return kept if high is None else kept.sub_(hardshrink(piece, high))


def drop_random(
    delta: Float[Tensor, "*s"], start: Callable[[], Stream], *, density: float, rescale: RescaleRandom = "share"
) -> Trim:  # fmt: skip
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
    delta: Float[Tensor, "*s"], start: Callable[[], Stream], *, density: float, epsilon: float, rescale: RescaleRandom = "share"
) -> Trim:
    """[delta]_e / p_e with probability p_e, else 0; in every row p_e rises with the rank of |delta_e| (DELLA's MagPrune).

    p_e = density + epsilon (2 r_e / (n - 1) - 1), r_e = 0 for the smallest of the n entries of a row, n - 1 for the largest. Rows run
    along the last axis; a vector is one row. epsilon is narrowed so that every p_e lies in [0, 1]: then the share that stays is density
    on average. Equal entries rank by position. The pieces must be whole rows.
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


def _positive(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, in x's own dtype: three times as fast as through a bool tensor."""
    return x.clamp_min_(0).sign_()


def _ranks(piece: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
    """Ranks of sizes within each row, from 0 (smallest) to 1; 1/2 in a row of one.

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
    """A trim from its beginning; for l1 after a first pass that measures what it keeps."""
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
