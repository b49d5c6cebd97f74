"""Trim deltas: which entries stay, and what they are multiplied by; random draws that order, shards and restarts cannot change.

A trim looks at a whole delta first (a threshold on sizes, a rescaling factor) and becomes a `Trim`, which then takes the delta piece by
piece, in order: trimming, electing and averaging are one pass in the processor's cache. Where a `Threshold` is all that a trim needs, the
caller may find it span by span from the file, then merge span by span; no tensor is ever whole in memory, and the bytes are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from recall_merge.maths.consensus import weighted_sum
from recall_merge.maths.deltas import Deltas, Dense
from recall_merge.maths.order_statistics import below, kth_largest
from recall_merge.maths.pieces import in_pieces, pieces

Stream = Callable[[Sequence[int]], Tensor]
"""shape -> the next numbers of one expert's stream, uniform in [0, 1), float32; drawn on the processor, wherever they are used."""
Start = Callable[[], Stream]
"""Begins one expert's stream, from its first number every time."""
Trim = Callable[[Tensor], Tensor]
"""The next piece of a delta -> the same piece with what is dropped set to 0."""
Combine = Callable[[Sequence[Tensor]], Tensor]
Threshold = tuple[float, float | None]
"""What stays: sizes above the first number and, if there is a second, not above that one."""
FindThreshold = Callable[[Callable[[int], float], int, torch.dtype, int, Mapping[str, Any]], Threshold]
"""(k -> k-th largest size of a delta, its number of entries, its dtype, the expert's number, options) -> which sizes stay."""
PerExpert = float | list[float]
"""One number for all experts, or one for each."""
RescaleKept = Annotated[
    Literal["none", "l1"], "multiply what stays: none, by nothing; l1, so that the sum of sizes is as before, over the tensor (as mergekit)"
]
Rescale = Annotated[
    Literal["share", "l1", "none"],
    "multiply what stays: share, by 1 / the probability of staying (as DARE and DELLA); l1, so that the sum of sizes is as before, over "
    "the tensor (as mergekit); none, by nothing",
]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one tensor: one stream per expert, Philox keyed by SHA-256 of seed, expert name and tensor name.

    >>> draws = Draws(seed=0, tensor="w", experts=("a", "b"))
    >>> bool((draws.stream(0)((3,)) == draws.stream(0)((3,))).all())
    True
    """

    seed: int
    tensor: str
    experts: tuple[str, ...]

    @property
    def streams(self) -> list[Start]:
        return [partial(self.stream, expert) for expert in range(len(self.experts))]

    def stream(self, expert: int) -> Stream:
        words = f"{self.seed}\0{self.experts[expert]}\0{self.tensor}".encode()
        key = int.from_bytes(hashlib.sha256(words).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return lambda shape: torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))


def add_trimmed(base: Dense, deltas: Deltas, trims: Sequence[Trim], combine: Combine, scale: float, *, by_row: bool = False) -> Dense:
    """theta_0 + scale * combine(v_1 .. v_k), v_q = trim_q(delta_q), in pieces; of whole rows where a trim needs them.

    >>> add_trimmed(torch.zeros(2), [torch.tensor([1.0, 5.0])], [partial(between, low=2.0)], lambda kept: kept[0], scale=2.0)
    tensor([ 0., 10.])
    """

    def merged(piece: Tensor, *parts: Tensor) -> Tensor:
        kept = [trim(part) for trim, part in zip(trims, parts, strict=True)]
        return torch.add(piece, combine(kept), alpha=scale)

    return in_pieces(merged, [base, *deltas], by_row=by_row)


def keep_sizes(
    deltas: Deltas, find: FindThreshold, thresholds: list[Threshold] | None = None, *, rescale: RescaleKept = "none", **options: Any
) -> list[Trim]:
    """For every delta, [delta]_e if its size is one that stays, else 0. Thresholds that are given are not looked for again.

    >>> delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    >>> keep_sizes([delta], largest, density=0.5)[0](delta), keep_sizes([delta], middle, density=0.5, gamma=0.25)[0](delta)
    (tensor([ 0., -3.,  2.,  0.]), tensor([1., 0., 2., 0.]))
    """
    if thresholds is None:
        kths = [partial(kth_largest, delta, size=True) for delta in deltas]
        thresholds = [find(kth, delta.numel(), delta.dtype, q, options) for q, (kth, delta) in enumerate(zip(kths, deltas, strict=True))]
    keeps = [partial(between, low=low, high=high) for low, high in thresholds]
    return [_rescaled(lambda keep=keep: keep, delta, rescale) for keep, delta in zip(keeps, deltas, strict=True)]


def largest(kth: Callable[[int], float], n: int, dtype: torch.dtype, expert: int, options: Mapping[str, Any]) -> Threshold:
    """Sizes from the int(density * n)-th largest up (at least the largest). All that tie with it stay: equal entries are treated alike."""
    density = _own(options["density"], expert)
    return (below(kth(_count(density, n)), dtype), None) if density < 1 and n else (0.0, None)


def middle(kth: Callable[[int], float], n: int, dtype: torch.dtype, expert: int, options: Mapping[str, Any]) -> Threshold:
    """All but the int(gamma * n) largest sizes; of the others, the largest, until int(density * n) stay (at least one).

    Where both do not fit (density + gamma > 1), fewer of the largest go. Entries that tie with one that stays stay too.
    """
    density, gamma = (_own(options[name], expert) for name in ("density", "gamma"))
    if density >= 1 or not n:
        return 0.0, None
    kept = _count(density, n)
    outliers = min(int(gamma * n), n - kept)
    return below(kth(outliers + kept), dtype), kth(outliers + 1)


def between(piece: Dense, low: float, high: float | None = None) -> Dense:
    """[x]_e if low < |x_e| (<= high, if given) else 0. x - x is 0 exactly, so the difference of two shrinks is exact."""
    kept = hardshrink(piece, low)
    return kept if high is None else kept.sub_(hardshrink(piece, high))


def drop_random(deltas: Deltas, streams: Sequence[Start], *, density: PerExpert, rescale: Rescale = "share") -> list[Trim]:
    """For every delta, [delta]_e / density with probability density, else 0, each entry on its own (DARE).

    >>> delta, numbers = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.1, 0.6, 0.4])
    >>> drop_random([delta], [lambda: lambda shape: numbers], density=0.5)[0](delta)
    tensor([2., 0., 2.])
    """

    def begin(start: Start, density: float) -> Trim:
        numbers, factor = start(), (1 / density if rescale == "share" else 1.0)
        return lambda piece: piece * _positive(density - numbers(piece.shape).to(piece.device)).mul_(factor)

    return [
        _rescaled(partial(begin, start, _own(density, expert)), delta, rescale)
        for expert, (delta, start) in enumerate(zip(deltas, streams, strict=True))
    ]


def drop_by_rank(
    deltas: Deltas, streams: Sequence[Start], *, density: PerExpert, epsilon: PerExpert, rescale: Rescale = "share"
) -> list[Trim]:
    """For every delta, [delta]_e / p_e with probability p_e, else 0; p_e rises with the rank of |delta_e| in its row (DELLA's MagPrune).

    p_e = density + epsilon (2 r_e / (n - 1) - 1), r_e = 0 for the smallest of the n entries of a row, n - 1 for the largest. Rows run
    along the last axis; a vector is one row. epsilon is narrowed so that every p_e lies in [0, 1], and density is the mean share that
    stays. Equal entries rank by position. The pieces must be whole rows.
    """

    def begin(start: Start, density: float, epsilon: float) -> Trim:
        numbers, spread = start(), min(epsilon, density, 1 - density)

        def trim(piece: Tensor) -> Tensor:
            stays = density + spread * (2 * _ranks(piece) - 1)
            mask = _positive(stays - numbers(piece.shape).to(piece.device))
            return piece * (mask / stays.clamp(min=torch.finfo(stays.dtype).tiny) if rescale == "share" else mask)

        return trim

    return [
        _rescaled(partial(begin, start, _own(density, expert), _own(epsilon, expert)), delta, rescale, by_row=True)
        for expert, (delta, start) in enumerate(zip(deltas, streams, strict=True))
    ]


def prune_by_saliency(deltas: Deltas, *, density: float = 0.5, saliency: Literal["deviation", "magnitude"] = "deviation") -> list[Dense]:
    """Before the merge, whatever the method: each delta with all but its int(density * n) most salient entries set to 0. Ties stay.

    saliency_q = |delta_q - mean_p delta_p| (deviation) or |delta_q| (magnitude), entry by entry. Both scores are our own; masks by a
    saliency score are from the abstract of LwPTV, Zhang et al. 2025, arXiv:2506.09093. Where no entry deviates, all stay.

    >>> [pruned.tolist() for pruned in prune_by_saliency([torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])], density=0.5)]
    [[0.0, 2.0], [0.0, -2.0]]
    """
    if density >= 1:
        return [delta.clone() for delta in deltas]
    mean = in_pieces(lambda *parts: weighted_sum(parts, [1 / len(parts)] * len(parts)), deltas)
    return [_pruned(delta, delta - mean if saliency == "deviation" else delta, density) for delta in deltas]


def _own(option: PerExpert, expert: int) -> float:
    return option[expert] if isinstance(option, list) else option


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
    keys = piece.abs().float().contiguous().view(torch.int32).long() << 32
    keys |= torch.arange(n, device=piece.device)
    if keys.is_cpu:
        keys.numpy().sort(axis=-1)  # numpy's sort of integers is the faster one
    else:
        keys = keys.sort(dim=-1).values
    keys &= 0xFFFFFFFF  # positions, from the smallest entry of each row to its largest
    ranks = torch.linspace(0, 1, n, dtype=piece.dtype, device=piece.device).expand(piece.shape)
    return torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(-1, keys, ranks)


def _rescaled(begin: Callable[[], Trim], delta: Tensor, rescale: str, *, by_row: bool = False) -> Trim:
    """A trim from its beginning; for l1 after a first pass that measures what it keeps."""
    if rescale != "l1":
        return begin()
    trim, before, after = begin(), 0.0, 0.0
    for (piece,) in pieces(delta, by_row=by_row):
        before += float(piece.abs().sum())
        after += float(trim(piece).abs_().sum())
    factor = before / after if after else 1.0
    again = begin()
    return lambda piece: again(piece).mul_(factor)


def _pruned(delta: Tensor, score: Tensor, density: float) -> Tensor:
    low, _ = largest(partial(kth_largest, score, size=True), score.numel(), score.dtype, 0, {"density": density})
    if low == 0 and not score.any():
        return delta.clone()
    return in_pieces(lambda part, scores: part * (scores.abs() > low), [delta, score])
