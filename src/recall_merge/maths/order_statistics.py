"""Order statistics by selection: the k-th largest of many numbers, exactly, without a sort, in about one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

    >>> kth_largest(torch.tensor([3.0, -5.0, 1.0]), 2, size=True)
    3.0
    """
    if not values.is_cpu:  # an accelerator selects by itself
        flat = values.detach().reshape(-1)
        return float((flat.abs() if size else flat).kthvalue(len(flat) - k + 1).values)
    numbers = values.detach().reshape(-1).numpy()
    if len(numbers) <= _SMALL:
        return _select(np.abs(numbers) if size else numbers, k)
    return _kth_largest(lambda span: np.abs(numbers[span]) if size else numbers[span], len(numbers), k, PIECE)


def kth_largest_size(read: Callable[[range], Tensor], count: int, k: int, *, span: int) -> float:
    """The k-th largest absolute value of `count` numbers of which `read` returns any span: a delta of any size needs a span's memory.

    >>> kth_largest_size(lambda span: torch.tensor([3.0, -5.0, 1.0])[span.start : span.stop], 3, 2, span=2)
    3.0
    """
    return _kth_largest(lambda part: np.abs(read(range(part.start, part.stop)).numpy()), count, k, span)


def _kth_largest(read: Callable[[slice], np.ndarray], count: int, k: int, span: int) -> float:
    """Floyd and Rivest 1975, "Expected time bounds for selection".

    A sample brackets the answer, one pass counts what lies above the bracket and gathers what lies strictly inside, and the answer is
    selected among those few. The sample is of short runs, for numbers from a file; neighbours are alike, so the bracket is eight standard
    deviations of its rank wide. One that missed is made four times as wide, so the result never depends on the sample.
    """

    def spans(length: int, step: int) -> Iterator[np.ndarray]:
        return (read(slice(start, min(start + length, count))) for start in range(0, count, step))

    sample = np.sort(np.concatenate([*spans(_RUN, max(_RUN, count * _RUN // _SAMPLE))]))
    rank, spread = len(sample) * k / count, 8 * (len(sample) * k / count * (1 - k / count)) ** 0.5 + 2
    while True:
        first, last = (len(sample) - 1 - int(rank + way * spread) for way in (1, -1))
        low, high = sample[first] if first >= 0 else -np.inf, sample[last] if last < len(sample) else np.inf
        above, reach, inside = 0, 0, []
        for numbers in spans(span, span):
            over = numbers > high
            above += int(np.count_nonzero(over))
            reach += int(np.count_nonzero(numbers >= low))
            inside.append(numbers[np.flatnonzero((numbers > low) ^ over)])
        gathered = np.concatenate(inside)
        if 0 < k - above <= len(gathered):
            return _select(gathered, k - above)
        if len(gathered) < k - above and (k <= reach or first < 0):  # the low end itself; or NaN among them, refused later
            return float(low) if first >= 0 else 0.0
        spread *= 4


def _select(numbers: np.ndarray, k: int) -> float:
    return float(np.partition(numbers, len(numbers) - k)[len(numbers) - k])


def below(threshold: float, dtype: torch.dtype) -> float:
    """The number just below a positive threshold in a given precision, so that `> below(t)` means `>= t`."""
    return float(torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.zeros((), dtype=dtype)))
