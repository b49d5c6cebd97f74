"""Prune each expert's delta before the merge, whatever the method: keep its most salient entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from recall_merge.maths.consensus import weighted_sum
from recall_merge.maths.deltas import Dense
from recall_merge.maths.order_statistics import below, kth_largest
from recall_merge.maths.pieces import in_pieces

Saliency = Literal["deviation", "magnitude"]


def prune_by_saliency(
    deltas: Sequence[Dense], *, density: float = 0.5, saliency: Saliency = "deviation"
) -> list[Dense]:  # fmt: skip
    """Each delta with all but its int(density * n) most salient entries set to 0; entries that tie with the last of them stay too.

    saliency_q = |delta_q - mean_p delta_p| (deviation) or |delta_q| (magnitude), entry by entry. Both scores are our own. The procedure,
    a saliency score per entry, a mask per expert and tensor, then any merge method, follows the abstract of LwPTV, Zhang et al. 2025,
    arXiv:2506.09093, whose score we do not know. Where no entry deviates (one expert, or all alike), all stay.

    >>> import torch
    >>> [pruned.tolist() for pruned in prune_by_saliency([torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])], density=0.5)]
    [[0.0, 2.0], [0.0, -2.0]]
    """
    if density >= 1:
        return [delta.clone() for delta in deltas]
    mean = in_pieces(lambda *parts: weighted_sum(parts, [1 / len(parts)] * len(parts)), deltas)
    return [_pruned(delta, delta - mean if saliency == "deviation" else delta, density) for delta in deltas]


def _pruned(delta: Tensor, score: Tensor, density: float) -> Tensor:
    if not delta.numel():
        return delta.clone()
    low = below(kth_largest(score, max(1, int(density * delta.numel())), size=True), score.dtype)
    if low == 0 and not score.any():
        return delta.clone()
    return in_pieces(lambda part, scores: part * (scores.abs() > low), [delta, score])
