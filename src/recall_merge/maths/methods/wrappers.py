"""What goes around any method: scales and weights by layer (LiNeS, the anchor ramp), pruning of deltas before the merge (LwPTV)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from recall_merge.maths.methods.consensus import weighted_sum
from recall_merge.maths.methods.order import below, kth_largest
from recall_merge.maths.methods.pieces import in_pieces


def lines_scales(blocks: int, *, alpha: float, beta: float) -> list[float]:
    """Scale on the merged delta at every layer 0..L+1: lambda_i = alpha + beta (i - 1) / (L - 1) for block i of L.

    Layer 0 (embedding) has the first block's scale alpha, layer L + 1 (final norm and head) the last block's alpha + beta; the authors'
    code gives alpha to both. A single block counts as the last. Wang et al. 2024, LiNeS, arXiv:2410.17146, eq. 2.

    >>> lines_scales(3, alpha=0.5, beta=1.0)
    [0.5, 0.5, 1.0, 1.5, 1.5]
    """
    inside = [alpha + beta * ((block - 1) / (blocks - 1) if blocks > 1 else 1.0) for block in range(1, blocks + 1)]
    return [alpha, *inside, inside[-1] if inside else alpha + beta]


def anchor_ramp(blocks: int, experts: int, *, anchor: int = -1, end: float = 1.0) -> Tensor:
    """Weights at every layer 0..L+1: equal at the bottom, the anchor's rising with layer to `end` at the top.    -> (L + 2, k)

    w_anchor^i = 1/k + (end - 1/k) i / (L + 1), the others share the rest. As reconstructed from the abstract and summaries of Alcover-Couso
    et al. 2024, Layer-wise model merging, arXiv:2409.15813: uniform in the initial layers, biased to the anchor in the final ones. The
    anchor is the newest expert (the last) by default.

    >>> anchor_ramp(1, 2)
    tensor([[0.5000, 0.5000],
            [0.2500, 0.7500],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    if experts == 1:
        return torch.ones(blocks + 2, 1, dtype=torch.float64)
    of_anchor = torch.linspace(1 / experts, end, blocks + 2, dtype=torch.float64)
    weights = ((1 - of_anchor) / (experts - 1)).unsqueeze(1).repeat(1, experts)
    weights[:, anchor] = of_anchor
    return weights


def prune_by_saliency(
    deltas: Sequence[Tensor], *, density: float = 0.5, saliency: Literal["apart", "size"] = "apart"
) -> list[Tensor]:  # fmt: skip
    """Each expert's delta with its redundant entries set to 0, layer by layer: give the result to any method.    k of (*s) -> k of (*s)

    saliency_q = |delta_q - mean_p delta_p| (apart) or |delta_q| (size); in each tensor the int(density * n) most salient entries of each
    delta stay, with ties, and the others take the base's value. One expert, or all alike, have nothing redundant by `apart`: all stay.
    LwPTV as reconstructed: the abstract of Zhang et al. 2025, arXiv:2506.09093, has a saliency score of the redundancy of a delta's
    entries, a mask for each task, pruning within each layer, any merging method after it; the score itself is ours.

    >>> [pruned.tolist() for pruned in prune_by_saliency([torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])], density=0.5)]
    [[0.0, 2.0], [0.0, -2.0]]
    """
    if density >= 1:
        return [delta.clone() for delta in deltas]
    middle = in_pieces(lambda *changes: weighted_sum(changes, [1 / len(changes)] * len(changes)), deltas)
    return [_pruned(delta, delta - middle if saliency == "apart" else delta, density) for delta in deltas]


def _pruned(delta: Tensor, score: Tensor, density: float) -> Tensor:
    if not delta.numel():
        return delta.clone()
    low = below(kth_largest(score, max(1, int(density * delta.numel())), size=True), score.dtype)
    if low == 0 and not score.any():
        return delta.clone()
    return in_pieces(lambda change, scored: change * (scored.abs() > low), [delta, score])
