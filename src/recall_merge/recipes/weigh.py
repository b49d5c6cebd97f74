"""From rows to weights: typical samples of the newest expert, representations of every model, similarity, weights by depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recall_merge.config import Representations
from recall_merge.errors import CheckpointError, DataError
from recall_merge.files.experts import BaseExpert, Expert, own_tensors
from recall_merge.progress import Progress, Silent
from recall_merge.recipes.finite import refuse_not_finite
from recall_merge.recipes.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TypicalSample:
    """A row that stands for a cluster: its position in the file, the tokens the newest expert reads, and the cluster's size."""

    row: int
    tokens: int
    cluster: int


@dataclass(frozen=True)
class Weighting:
    """Weights by depth, and how they came about.

    Attributes:
        models: the pool, newest last; begins with 'base' where the base is in it.
        weights: (L + 2, models), float64; each row sums to 1.
        similarity: (L + 1, models), float64, depths 0..L; None where weights were given.
        samples: the typical samples, in the order of their rows.
        notes: what a reader should know of how rows were handled.
    """

    models: tuple[str, ...]
    weights: Tensor
    similarity: Tensor | None = None
    samples: tuple[TypicalSample, ...] = ()
    notes: tuple[str, ...] = ()

    def of_experts(self, depth: int) -> list[float]:
        """The experts' weights at one depth, in their order, without the base's."""
        return self.weights[depth, self.models[0] == "base" :].tolist()

    def table(self, values: Tensor) -> dict[str, Any]:
        """The form in which the record keeps similarity and weights; each row of numbers is a depth, from 0 on."""
        rows = values.tolist()
        return {"experts": list(self.models), "depths": list(range(len(rows))), "rows": rows}


def weigh(plan: Plan, progress: Progress | None = None) -> Weighting:
    """The weights of a plan, given or from representations.

    Raises:
        DataError: if no row has any text.
        CheckpointError: if a model cannot be run, or gives numbers that are not finite.
    """
    import torch

    progress, depths = progress or Silent(), plan.base.depths
    if not isinstance(plan.weights, Representations):
        names = tuple(expert.name for expert in plan.experts)
        return Weighting(names, torch.tensor(plan.weights, dtype=torch.float64).repeat(depths.last + 1, 1))

    from recall_merge.maths.similarity import similarity
    from recall_merge.maths.weights import control, outside_blocks, softmax_weights

    rule = plan.weights
    texts, samples, notes = _typical(plan, rule, progress)
    pool = _pool(plan, rule)
    states = _representations(plan, rule, pool, texts, progress)  # (L + 1, n, m, d)
    alike = torch.stack([similarity(h, kernel=rule.kernel, bandwidth=rule.bandwidth) for h in states])
    weights = softmax_weights(alike, temperature=rule.temperature)
    weights = outside_blocks(control(weights, rule.control, seed=plan.run.seed), rule.outside_blocks)
    return Weighting(tuple(model.name for model in pool), weights, alike, samples, tuple(notes))


def _pool(plan: Plan, rule: Representations) -> list[Expert]:
    with_base = rule.base_in_pool == "always" or (rule.base_in_pool == "single" and len(plan.experts) == 1)
    return [*([BaseExpert(plan.base)] if with_base else []), *plan.experts]


def _typical(plan: Plan, rule: Representations, progress: Progress) -> tuple[list[str], tuple[TypicalSample, ...], list[str]]:
    """The texts of the typical samples, chosen by the newest expert from the pool of its rows."""
    from recall_merge.maths.samples import typical_samples
    from recall_merge.models.hidden import representations, tokenize
    from recall_merge.models.text import render

    newest, wanted = plan.experts[-1], plan.samples
    tokenizer = _tokenizer(plan, newest)
    seen: dict[str, int] = {}  # text -> its first row
    for row in plan.rows:
        text = "".join(render(row, tokenizer, template=wanted.template))
        if row.plain.strip() or row.completion.strip():
            seen.setdefault(text, row.index)
    if not seen:
        raise DataError("no row has any text", where=wanted.path, fix="give rows with text")
    notes = []
    if len(seen) < len(plan.rows):
        notes.append(f"{len(plan.rows) - len(seen)} of {len(plan.rows)} rows are empty or repeat another and were left out")
    texts = list(seen)
    if len(texts) > wanted.pool:
        notes.append(f"{wanted.pool} of {len(texts)} rows were drawn for the pool (seed {plan.run.seed})")
        texts = [texts[place] for place in sorted(random.Random(plan.run.seed).sample(range(len(texts)), wanted.pool))]
    tokens = tokenize(texts, tokenizer, max_tokens=wanted.max_tokens)
    cut = sum(len(ids) == wanted.max_tokens for ids in tokens)
    if cut:
        notes.append(f"{cut} rows reach {wanted.max_tokens} tokens and were cut there")
    if len(texts) <= wanted.count:
        notes.append(f"there are {len(texts)} different rows, no more than the {wanted.count} samples asked for: all of them are typical")
        chosen, sizes = range(len(texts)), [1] * len(texts)
    else:
        blocks = plan.base.depths.blocks
        spaces = {"last": [blocks], "middle": [(blocks + 1) // 2], "several": sorted({(blocks + 3) // 4, (blocks + 1) // 2, blocks})}
        with progress.stage(f"choosing typical samples with {newest.name}", sum(map(len, tokens)), "tokens") as advance:
            model = _build(plan, newest, rule)
            states = representations(
                model, tokens, plan.base.depths, at=spaces[wanted.space], pooling=rule.pooling, threads=plan.threads, progress=advance
            )
        _check_finite(plan, states, newest)
        typical = typical_samples(states.transpose(0, 1).flatten(1).numpy(), wanted.count, seed=plan.run.seed)
        chosen, sizes = typical.rows, typical.sizes
    samples = tuple(TypicalSample(seen[texts[place]], len(tokens[place]), size) for place, size in zip(chosen, sizes, strict=True))
    return [texts[place] for place in chosen], samples, notes


def _representations(plan: Plan, rule: Representations, pool: Sequence[Expert], texts: list[str], progress: Progress) -> Tensor:
    """Every model's representation of every sample at every depth 0..L, one model in memory at a time.    -> (L + 1, n, m, d)"""
    import torch

    from recall_merge.models.hidden import representations, tokenize

    states = []
    for expert in pool:
        tokens = tokenize(texts, _tokenizer(plan, expert), max_tokens=plan.samples.max_tokens)
        with progress.stage(f"representations of {expert.name}", sum(map(len, tokens)), "tokens") as advance:
            model = _build(plan, expert, rule)
            states.append(representations(model, tokens, plan.base.depths, pooling=rule.pooling, threads=plan.threads, progress=advance))
            del model
        _check_finite(plan, states[-1], expert)
    return torch.stack(states, dim=1)


def _build(plan: Plan, expert: Expert, rule: Representations) -> Any:
    from recall_merge.models.build import build_model

    tensors = own_tensors(expert, plan.base, plan.merges)
    return build_model(plan.base.folder, tensors, dtype=rule.precision, vocabulary_size=len(tensors[plan.base.embedding]))


def _tokenizer(plan: Plan, expert: Expert) -> Any:
    """The expert's own tokenizer where vocabularies differ, else the base's: then all models read the same tokens."""
    from recall_merge.files.vocabulary import read_vocabulary
    from recall_merge.models.build import load_tokenizer

    own = plan.vocabulary is not None and read_vocabulary(expert.folder) is not None
    return load_tokenizer(expert.folder if own else plan.base.folder)


def _check_finite(plan: Plan, states: Tensor, expert: Expert) -> None:
    if not states.isfinite().all():
        refuse_not_finite(plan)
        fix = "its weights are finite, so the forward pass overflows: look at the training that made it"
        raise CheckpointError(f"expert '{expert.name}' represents the samples by numbers that are not finite", where=expert.folder, fix=fix)
