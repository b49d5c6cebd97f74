"""Trim each delta, then combine: TIES, DARE, Breadcrumbs and DELLA. How to trim in little time and memory: `maths/trimming.py`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from annotated_types import Interval

from recall_merge.maths.consensus import Elect, Mean, agreeing, weighted_sum
from recall_merge.maths.deltas import Deltas, Dense, Weights
from recall_merge.maths.methods.registry import Fraction, Scale, method
from recall_merge.maths.trimming import (
    Draws,
    Rescale,
    RescaleKept,
    Threshold,
    add_trimmed,
    drop_by_rank,
    drop_random,
    keep_sizes,
    largest,
    middle,
)

BelowOne = Annotated[float, Interval(ge=0, lt=1)]
Density = Annotated[Fraction | list[Fraction], "share of each delta's entries that stay; one number, or one per expert"]
Gamma = Annotated[
    BelowOne | list[BelowOne], "share of each delta's entries that are outliers, the largest, and dropped; one number, or one per expert"
]
Epsilon = Annotated[
    BelowOne | list[BelowOne],
    "a row's largest entry stays with probability density + epsilon, its smallest with density - epsilon; one number, or one per expert",
]


@method("ties", source="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708", find_threshold=largest)
def ties(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    thresholds: list[Threshold] | None = None,
    density: Density = 0.2,
    rescale: RescaleKept = "none",
    elect: Elect = "weighted",
    mean: Mean = "weights",
    scale: Scale = 1.0,
) -> Dense:
    """Trim, elect a sign, merge those that agree.

    theta = theta_0 + scale * sum_{q in A} w_q v_q / sum_{q in A} w_q, entry by entry; theta_0 where nobody agrees.
    v_q: delta_q with only the int(density * n) largest of the tensor's n entries; entries that tie with the last of them stay too.
    A = {q : sign(v_q) = s},  s = sign(sum_q w_q v_q), + where that sum is 0.
    The sign is elected after weighting and the sum divided by the agreeing weights, as in mergekit 0.1.5; `elect` and `mean` offer peft's
    convention. So only ratios of weights matter, and a base in the pool has no say.

    >>> import torch
    >>> ties(torch.zeros(3), [torch.tensor([4.0, -3.0, 1.0]), torch.tensor([1.0, 5.0, -2.0])], [0.5, 0.5], density=0.7)
    tensor([ 4.,  5., -2.])
    """
    trims = keep_sizes(deltas, largest, thresholds, rescale=rescale, density=density)
    return add_trimmed(base, deltas, trims, partial(agreeing, weights=weights, elect=elect, mean=mean), scale)


@method("dare_linear", source="Yu et al. 2024, Language models are super Mario, arXiv:2311.03099")
def dare_linear(
    base: Dense, deltas: Deltas, weights: Weights, *, draws: Draws, density: Density = 0.5, rescale: Rescale = "share", scale: Scale = 1.0
) -> Dense:
    """Drop entries at random, rescale the rest, average.

    theta = theta_0 + scale * sum_q w_q v_q,  v_q = m_q delta_q / density,  m_q ~ Bernoulli(density), entry by entry.
    Random numbers depend on seed, expert and tensor name alone. This is a mean of trimmed deltas; the paper's plain sum is scale = k.
    """
    trims = drop_random(deltas, draws.streams, density=density, rescale=rescale)
    return add_trimmed(base, deltas, trims, partial(weighted_sum, weights=weights), scale)


@method("dare_ties", source="Yu et al. 2024, Language models are super Mario, arXiv:2311.03099, with the election of arXiv:2306.01708")
def dare_ties(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    draws: Draws,
    density: Density = 0.5,
    rescale: Rescale = "share",
    elect: Elect = "weighted",
    mean: Mean = "none",
    scale: Scale = 1.0,
) -> Dense:
    """Drop entries at random, rescale the rest, sum those that agree on a sign.

    theta = theta_0 + scale * sum_{q in A} w_q v_q,  v_q = m_q delta_q / density,  m_q ~ Bernoulli(density), entry by entry.
    A = {q : sign(v_q) = s},  s = sign(sum_q w_q v_q), + where that sum is 0.
    The random numbers depend on seed, expert and tensor name alone. Signs are elected after weighting and the sum is not divided
    (mean: none), as in mergekit 0.1.5: rescaling makes up for what is dropped, and dividing by the agreeing weights would do so twice.
    """
    trims = drop_random(deltas, draws.streams, density=density, rescale=rescale)
    return add_trimmed(base, deltas, trims, partial(agreeing, weights=weights, elect=elect, mean=mean), scale)


@method("breadcrumbs", source="Davari and Belilovsky 2024, Model Breadcrumbs, arXiv:2312.06795", find_threshold=middle)
def breadcrumbs(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    thresholds: list[Threshold] | None = None,
    density: Density = 0.1,
    gamma: Gamma = 0.01,
    rescale: RescaleKept = "none",
    scale: Scale = 1.0,
) -> Dense:
    """Drop outliers and small entries, average.

    theta = theta_0 + scale * sum_q w_q v_q, with v_q the middle of delta_q: of the tensor's n entries the int(gamma * n) largest
    (outliers) go, then the smallest, until int(density * n) are left; entries that tie with one that stays stay too.
    The weights sum to 1, so this is a mean of trimmed deltas; the paper's plain sum is scale = k.
    """
    trims = keep_sizes(deltas, middle, thresholds, rescale=rescale, density=density, gamma=gamma)
    return add_trimmed(base, deltas, trims, partial(weighted_sum, weights=weights), scale)


@method(
    "breadcrumbs_ties",
    source="Davari and Belilovsky 2024, Model Breadcrumbs, arXiv:2312.06795, with the election of arXiv:2306.01708",
    find_threshold=middle,
)
def breadcrumbs_ties(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    thresholds: list[Threshold] | None = None,
    density: Density = 0.1,
    gamma: Gamma = 0.01,
    rescale: RescaleKept = "none",
    elect: Elect = "weighted",
    mean: Mean = "none",
    scale: Scale = 1.0,
) -> Dense:
    """Drop outliers and small entries, sum those that agree on a sign.

    theta = theta_0 + scale * sum_{q in A} w_q v_q, entry by entry, with v_q the middle of delta_q, as in `breadcrumbs`.
    A = {q : sign(v_q) = s},  s = sign(sum_q w_q v_q), + where that sum is 0.
    Signs are elected after weighting and the sum is not divided (mean: none), as in mergekit 0.1.5.
    """
    trims = keep_sizes(deltas, middle, thresholds, rescale=rescale, density=density, gamma=gamma)
    return add_trimmed(base, deltas, trims, partial(agreeing, weights=weights, elect=elect, mean=mean), scale)


@method("della", source="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617")
def della(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    draws: Draws,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    rescale: Rescale = "share",
    elect: Elect = "weighted",
    mean: Mean = "weights",
    scale: Scale = 1.0,
) -> Dense:
    """Drop small entries more often than large ones, rescale, merge those that agree on a sign.

    theta = theta_0 + scale * sum_{q in A} w_q v_q / sum_{q in A} w_q, entry by entry; theta_0 where nobody agrees.
    v_q = m_q delta_q / p_q,  m_q ~ Bernoulli(p_q),  p_q = density + epsilon (2 r / (n - 1) - 1), r = 0 .. n - 1 an entry's rank by size
    among the n of its row. Rows run along the last axis; a vector is one row. epsilon is half the width of the range, as in mergekit.
    A = {q : sign(v_q) = s},  s = sign(sum_q w_q v_q), + where that sum is 0.
    Elected after weighting and divided by the agreeing weights, as in mergekit 0.1.5; `elect` and `mean` offer peft's convention.
    """
    trims = drop_by_rank(deltas, draws.streams, density=density, epsilon=epsilon, rescale=rescale)
    return add_trimmed(base, deltas, trims, partial(agreeing, weights=weights, elect=elect, mean=mean), scale, by_row=True)


@method("della_linear", source="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617, without the election")
def della_linear(
    base: Dense,
    deltas: Deltas,
    weights: Weights,
    *,
    draws: Draws,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    rescale: Rescale = "share",
    scale: Scale = 1.0,
) -> Dense:
    """Drop small entries more often than large ones, rescale, average.

    theta = theta_0 + scale * sum_q w_q v_q, with v_q the randomly trimmed delta_q of `della`.
    The weights sum to 1, so this is a mean of trimmed deltas; the paper's plain sum is scale = k.
    """
    trims = drop_by_rank(deltas, draws.streams, density=density, epsilon=epsilon, rescale=rescale)
    return add_trimmed(base, deltas, trims, partial(weighted_sum, weights=weights), scale, by_row=True)
