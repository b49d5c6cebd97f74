"""LiNeS: scale what a merge adds to the base, layer by layer."""

from __future__ import annotations


def lines_scales(blocks: int, *, alpha: float, beta: float) -> list[float]:
    """Scale on the merged delta at every layer 0..L+1: lambda_i = alpha + beta (i - 1) / (L - 1) for block i of L.

    Wang et al. 2024, LiNeS, arXiv:2410.17146, eq. 2. Layer 0 (embedding) has the first block's scale alpha, layer L + 1 (final norm and
    head) the last block's, alpha + beta; the authors' code gives alpha to both. A single block counts as the last.

    >>> lines_scales(3, alpha=0.5, beta=1.0)
    [0.5, 0.5, 1.0, 1.5, 1.5]
    """
    inside = [alpha + beta * ((block - 1) / (blocks - 1) if blocks > 1 else 1.0) for block in range(1, blocks + 1)]
    return [alpha, *inside, inside[-1] if inside else alpha + beta]
