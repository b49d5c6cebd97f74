"""Order statistics by selection: the k-th largest of many numbers, exactly, without a sort.

It buys time: about one pass over the numbers. And memory: `kth_largest_size` reads numbers span by span, so a delta of any size
needs the memory of a span.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.pieces import PIECE

_SMALL = 1 << 18  # below this a plain selection on a copy is as fast
_SAMPLE = 1 << 15
_RUN = 256  # neighbours that are sampled together when numbers come from a file


def kth_largest(values: Float[Tensor, "*s"], k: int, *, size: bool = False) -> float:
    """The k-th largest entry, or with `size` the k-th largest absolute value; 1 <= k <= number of entries.

    Floyd and Rivest 1975, "Expected time bounds for selection": a sample brackets the answer, one pass counts what lies above the
    bracket and gathers what lies in it, and the answer is selected among those few. If the count shows that the bracket missed, all
    entries are searched, so the result never depends on the sample.

    >>> kth_largest(torch.tensor([3.0, -5.0, 1.0]), 2, size=True)
    3.0
    """
    numbers = values.detach().reshape(-1).numpy()
    if len(numbers) > _SMALL:
        answer = _bracketed(numbers, k, size)
        if answer is not None:
            return answer
    return _select(np.abs(numbers) if size else numbers, k)


def _select(numbers: np.ndarray, k: int) -> float:
    return float(np.partition(numbers, len(numbers) - k)[len(numbers) - k])


def _bracketed(numbers: np.ndarray, k: int, size: bool) -> float | None:
    """The answer by way of a sample, or None if the sample's bracket does not hold it."""
    sample = numbers[:: (len(numbers) // _SAMPLE) | 1]
    sample = np.sort(np.abs(sample) if size else sample)
    share = k / len(numbers)
    middle, spread = len(sample) * share, 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2  # four standard deviations of its rank
    low = sample[max(0, len(sample) - 1 - int(middle + spread))]
    high = sample[min(len(sample) - 1, len(sample) - 1 - int(middle - spread))]
    above, inside = 0, []
    for start in range(0, len(numbers), PIECE):
        piece = numbers[start : start + PIECE]
        if size:
            piece = np.abs(piece)
        over = piece > high
        above += int(np.count_nonzero(over))
        inside.append(piece[np.flatnonzero((piece >= low) ^ over)])
    gathered = np.concatenate(inside)
    return _select(gathered, k - above) if 0 < k - above <= len(gathered) else None


def kth_largest_size(read: Callable[[range], Tensor], count: int, k: int, *, span: int) -> float:
    """The k-th largest absolute value of `count` numbers of which `read` returns any span, as often as needed.

    As `kth_largest`, with a sample of short runs. Neighbours are alike, so its bracket is wider, and wider again each time it misses.
    Memory holds one span and what lies strictly inside the bracket: equal numbers take none.

    >>> kth_largest_size(lambda span: torch.tensor([3.0, -5.0, 1.0])[span.start : span.stop], 3, 2, span=2)
    3.0
    """

    def sizes(start: int, length: int) -> np.ndarray:
        return np.abs(read(range(start, min(start + length, count))).numpy())

    step = max(_RUN, count * _RUN // _SAMPLE)
    sample = np.sort(np.concatenate([sizes(start, _RUN) for start in range(0, count, step)]))
    share, spread = k / count, 8 * (len(sample) * k / count * (1 - k / count)) ** 0.5 + 2
    while True:
        first, last = (len(sample) - 1 - int(len(sample) * share + way * spread) for way in (1, -1))
        low = sample[first] if first >= 0 else -1.0
        high = sample[last] if last < len(sample) else np.inf
        above, reach, inside = 0, 0, []
        for start in range(0, count, span):
            piece = sizes(start, span)
            over = piece > high
            above += int(np.count_nonzero(over))
            reach += int(np.count_nonzero(piece >= low))
            inside.append(piece[np.flatnonzero((piece > low) ^ over)])
        gathered = np.concatenate(inside)
        if 0 < k - above <= len(gathered):
            return _select(gathered, k - above)
        if len(gathered) < k - above and (k <= reach or low < 0):  # the low end itself; or NaN among them, refused later
            return max(0.0, float(low))
        spread *= 4


def below(threshold: float, dtype: torch.dtype) -> float:
    """The number just below a positive threshold in a given precision, so that `> below(t)` means `>= t`."""
    return float(torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.zeros((), dtype=dtype)))
