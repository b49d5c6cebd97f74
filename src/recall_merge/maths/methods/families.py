"""Thin each delta out, then combine: TIES, DARE, Breadcrumbs and DELLA, each a row of `FAMILY` = a trim, a consensus, and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, get_args

import torch
from torch import Tensor

from recall_merge.maths.methods import consensus, sparsify
from recall_merge.maths.methods.options import Scale
from recall_merge.maths.methods.pieces import in_pieces
from recall_merge.maths.methods.registry import Draws, FindThreshold, method


@dataclass(frozen=True)
class Row:
    """One method of the family: what it is, and which of the parts' defaults it changes."""

    name: str
    source: str
    trim: Callable[..., sparsify.Trim]
    combine: Callable[..., Tensor]
    doc: str
    defaults: dict[str, Any] = field(default_factory=dict)


_TIES = """theta = theta_0 + scale * sum_{q in A} w_q v_q / sum_{q in A} w_q, entry by entry, with v_q the trimmed delta_q and
    A = {q : sign(v_q) = s},  s = sign(sum_q w_q v_q), + where that sum is 0; no change where nobody agrees.
    base (*s), deltas k of (*s) -> (*s)"""
_SUM_TIES = """theta = theta_0 + scale * sum_{q in A} w_q v_q, entry by entry, with v_q the trimmed delta_q and A = {q : sign(v_q) = s},
    s = sign(sum_q w_q v_q), + where that sum is 0.    base (*s), deltas k of (*s) -> (*s)"""
_SUM = "theta = theta_0 + scale * sum_q w_q v_q, with v_q the trimmed delta_q.    base (*s), deltas k of (*s) -> (*s)"
_WEIGHTS_TIES = """Weights: signs are elected after weighting and the sum is divided by the agreeing weights, as in mergekit 0.1.5;
    `elect` and `mean` offer peft's convention. So only ratios of weights matter, and a base in the pool has no say."""
_WEIGHTS_NONE = """Weights: signs are elected after weighting; the sum over A is not divided (mean: none), as in mergekit 0.1.5. What is
    dropped is made up for by rescaling what stays; dividing by the agreeing weights would make up for it twice."""
_WEIGHTS_CRUMBS = """Weights: signs are elected after weighting; the sum over A is not divided (mean: none), as in mergekit 0.1.5,
    so where all agree this is the mean of the trimmed deltas."""
_WEIGHTS_SUM = "Weights: they sum to 1, so this is a mean of trimmed deltas; the paper's plain sum is scale = k."
_LARGEST = "Trim: in each tensor, the int(density * n) entries of largest size stay; entries that tie with the last of them stay too."
_MIDDLE = """Trim: in each tensor, the int(gamma * n) largest entries (outliers) go, then the smallest, until int(density * n) are left;
    entries that tie with one that stays stay too."""
_RANDOM = "Trim: every entry stays with probability density, on its own; its random number depends only on seed, expert and tensor name."
_RANK = """Trim: an entry stays with probability density + epsilon (2 r / (n - 1) - 1), r its rank by size among the n of its row.
    Rows run along the last axis; a vector is one row. epsilon is half the width of that range, as in mergekit."""

PER_EXPERT = ("density", "gamma", "epsilon")  # options that experts may have each for themselves

FAMILY = (
    Row(
        "ties",
        "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
        sparsify.keep_largest,
        consensus.agreeing,
        f"Trim, elect a sign, merge those that agree.\n\n{_TIES}\n{_LARGEST}\n{_WEIGHTS_TIES}",
    ),
    Row(
        "dare_linear",
        "Yu et al. 2024, Language models are super Mario, arXiv:2311.03099",
        sparsify.drop_random,
        consensus.weighted_sum,
        f"Drop entries at random, rescale the rest, average.\n\n{_SUM}\n{_RANDOM}\n{_WEIGHTS_SUM}",
    ),
    Row(
        "dare_ties",
        "Yu et al. 2024, Language models are super Mario, arXiv:2311.03099, with the election of arXiv:2306.01708",
        sparsify.drop_random,
        consensus.agreeing,
        f"Drop entries at random, rescale the rest, sum those that agree on a sign.\n\n{_SUM_TIES}\n{_RANDOM}\n{_WEIGHTS_NONE}",
        {"mean": "none"},
    ),
    Row(
        "breadcrumbs",
        "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv:2312.06795",
        sparsify.keep_middle,
        consensus.weighted_sum,
        f"Drop outliers and small entries, average.\n\n{_SUM}\n{_MIDDLE}\n{_WEIGHTS_SUM}",
    ),
    Row(
        "breadcrumbs_ties",
        "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv:2312.06795, with the election of arXiv:2306.01708",
        sparsify.keep_middle,
        consensus.agreeing,
        f"Drop outliers and small entries, sum those that agree on a sign.\n\n{_SUM_TIES}\n{_MIDDLE}\n{_WEIGHTS_CRUMBS}",
        {"mean": "none"},
    ),
    Row(
        "della",
        "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
        sparsify.drop_by_rank,
        consensus.agreeing,
        f"Drop small entries more often than large ones, rescale, merge those that agree on a sign.\n\n{_TIES}\n{_RANK}\n{_WEIGHTS_TIES}",
    ),
    Row(
        "della_linear",
        "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617, without the election",
        sparsify.drop_by_rank,
        consensus.weighted_sum,
        f"Drop small entries more often than large ones, rescale, average.\n\n{_SUM}\n{_RANK}\n{_WEIGHTS_SUM}",
    ),
)


def build(row: Row) -> Callable[..., Tensor]:
    """The merge function of one row; its options are those of its parts, and the scale. `thresholds` are what `look` has found, if it has."""
    trim_options, combine_options = _options(row.trim), _options(row.combine)
    random = row.trim in (sparsify.drop_random, sparsify.drop_by_rank)

    def merge(
        base: Tensor,
        deltas: Sequence[Tensor],
        weights: Sequence[float],
        *,
        draws: Draws | None = None,
        thresholds: Sequence[sparsify.TrimThreshold] | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> Tensor:
        if not base.numel():
            return base.clone()
        chosen = {name: row.defaults.get(name, option.default) for name, option in {**trim_options, **combine_options}.items()} | options
        trims: list[sparsify.Trim] = [partial(sparsify.between, low=low, high=high) for low, high in thresholds or []]
        for expert, delta in enumerate(deltas if thresholds is None else []):
            told = {name: value[expert] if isinstance(value := chosen[name], list) else value for name in trim_options}
            trims.append(row.trim(delta, *([partial(draws.stream, expert)] if draws is not None else []), **told))
        combine = partial(row.combine, **{name: chosen[name] for name in combine_options})

        def merged(piece: Tensor, *changes: Tensor) -> Tensor:
            kept = [trim(change) for trim, change in zip(trims, changes, strict=True)]
            return torch.add(piece, combine(kept, weights), alpha=scale)

        return in_pieces(merged, [base, *deltas], by_row=random)

    merge.__name__ = merge.__qualname__ = row.name
    merge.__doc__ = row.doc
    signature = _signature(merge, row, {**trim_options, **combine_options}, random)
    merge.__signature__ = signature  # type: ignore[attr-defined]
    merge.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()} | {"return": Tensor}
    return merge


def _options(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(part, eval_str=True).parameters.values()
    return {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _signature(merge: Callable[..., Tensor], row: Row, options: dict[str, inspect.Parameter], random: bool) -> inspect.Signature:
    base, deltas, weights, draws, thresholds, scale, _ = inspect.signature(merge, eval_str=True).parameters.values()
    chosen = [option.replace(default=row.defaults.get(option.name, option.default)) for option in options.values()]
    chosen = [_one_an_expert(option) if option.name in PER_EXPERT else option for option in chosen]
    draws = [draws.replace(annotation=Draws, default=inspect.Parameter.empty)] if random else []
    thresholds = [thresholds] if row.trim in sparsify.THRESHOLDS else []
    return inspect.Signature(
        [base, deltas, weights, *draws, *thresholds, *chosen, scale.replace(annotation=Scale)], return_annotation=Tensor
    )


def _one_an_expert(option: inspect.Parameter) -> inspect.Parameter:
    """The option as one number, or a list of one an expert."""
    number, interval, meaning = get_args(option.annotation)
    one = Annotated[number, interval]
    return option.replace(annotation=Annotated[one | list[one], f"{meaning}; one number, or one an expert"])


def threshold_finder(row: Row) -> FindThreshold | None:
    """How to find, without the whole delta, the band of sizes that a row's trim keeps; None where it needs to know more than that."""
    if row.trim not in sparsify.THRESHOLDS:
        return None
    names = [name for name in _options(row.trim) if name != "rescale"]

    def threshold(kth: sparsify.Kth, n: int, dtype: torch.dtype, expert: int, options: Mapping[str, Any]) -> sparsify.TrimThreshold:
        told = {name: value[expert] if isinstance(value := options[name], list) else value for name in names}
        return sparsify.THRESHOLDS[row.trim](kth, n, dtype, **told)

    return threshold


for _row in FAMILY:
    method(_row.name, source=_row.source, find_threshold=threshold_finder(_row))(build(_row))
