"""From rows to weights: typical samples of the newest expert, representations of every model, similarity, weights by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recall_merge.files.experts import BaseExpert, Expert
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import Losses, RecallWeights
from recall_merge.merging.samples import TypicalSample, build_expert, check_finite, expert_tokenizer, typical_texts
from recall_merge.runtime.errors import Unwalkable
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergeWeights:
    """Weights by layer, and how they came about.

    Attributes:
        models: the pool, newest last; begins with 'base' where the base is in it.
        weights: (L + 2, models), float64; each row sums to 1.
        similarity: (L + 1, models), float64, layers 0..L; None where weights were given.
        samples: the typical samples, in the order of their rows.
        notes: what a reader should know of how rows were handled.
        losses: of every expert on the typical samples; None where weights are not made of them.
    """

    models: tuple[str, ...]
    weights: Tensor
    similarity: Tensor | None = None
    samples: tuple[TypicalSample, ...] = ()
    notes: tuple[str, ...] = ()
    losses: Mapping[str, float] | None = None

    def of_experts(self, layer: int) -> list[float]:
        """The experts' weights at one layer, in their order, without the base's."""
        return self.weights[layer, self.models[0] == "base" :].tolist()

    def table(self, values: Tensor) -> dict[str, Any]:
        """The form in which the record keeps similarity and weights; each row of numbers is a layer, from 0 on."""
        rows = values.tolist()
        return {"experts": list(self.models), "layers": list(range(len(rows))), "rows": rows}


def compute_weights(plan: Plan, progress: Progress | None = None) -> MergeWeights:
    """The weights of a plan, given or from representations.

    Raises:
        DataError: if no row has any text.
        CheckpointError: if a model cannot be run, or gives numbers that are not finite.
    """
    import torch

    progress = progress or Silent()
    if isinstance(plan.weights, Losses):
        from recall_merge.merging.losses import weights_from_losses

        return weights_from_losses(plan, plan.weights, progress)
    if not isinstance(plan.weights, RecallWeights):
        names = tuple(expert.name for expert in plan.experts)
        given = torch.tensor(plan.weights, dtype=torch.float64)
        return MergeWeights(names, given if given.ndim == 2 else given.repeat(plan.base.layers.last + 1, 1))
    rule = plan.weights
    texts, samples, notes = typical_texts(plan, rule, progress)
    states = [represent_whole(plan, rule, expert, texts, progress) for expert in pool_of(plan, rule)]  # one model in memory at a time
    return compare(plan, rule, torch.stack(states, dim=1), samples, notes)


def compare(plan: Plan, rule: RecallWeights, states: Tensor, samples: tuple[TypicalSample, ...], notes: Sequence[str]) -> MergeWeights:
    """Weights from what the models of the pool represent.

    Args:
        states: (L + 1, n, m, d), of every model and sample at every layer 0..L.
    """
    import torch

    from recall_merge.maths.similarity import similarity

    similarity_rows = torch.stack([similarity(h, kernel=rule.kernel, bandwidth=rule.bandwidth) for h in states])
    return weights_from_similarity(plan, rule, similarity_rows, samples, notes)


def weights_from_similarity(
    plan: Plan, rule: RecallWeights, similarity_rows: Tensor, samples: tuple[TypicalSample, ...], notes: Sequence[str]
) -> MergeWeights:
    """Weights of the layers whose similarity is known, and of one more.

    Args:
        alike: (i, n), of every model of the pool at the first i layers.
    """
    from recall_merge.maths.weights import ablation, outside_blocks, softmax_weights

    weights = softmax_weights(similarity_rows, temperature=rule.temperature)
    weights = outside_blocks(ablation(weights, rule.ablation, seed=plan.run.seed), rule.outside_blocks)
    return MergeWeights(tuple(model.name for model in pool_of(plan, rule)), weights, similarity_rows, samples, tuple(notes))


def pool_of(plan: Plan, rule: RecallWeights) -> list[Expert]:
    """The models that are compared, the newest last."""
    with_base = rule.base_in_pool == "always" or (rule.base_in_pool == "single" and len(plan.experts) == 1)
    return [*([BaseExpert(plan.base)] if with_base else []), *plan.experts]


def represent_whole(plan: Plan, rule: RecallWeights, expert: Expert, texts: Sequence[str], progress: Progress) -> Tensor:
    """One model's representation of every sample at every layer 0..L, with the whole of it in memory.    -> (L + 1, m, d)"""
    from recall_merge.models.hidden_states import representations, tokenize

    tokens = tokenize(texts, expert_tokenizer(plan, expert), max_tokens=plan.samples.max_tokens)
    with progress.stage(f"representations of {expert.name}", sum(map(len, tokens)), "tokens") as advance:
        model = build_expert(plan, expert, rule)
        states = representations(model, tokens, plan.base.layers, pooling=rule.pooling, threads=plan.threads, progress=advance)
    check_finite(plan, states, expert)
    return states


def whole_note(error: Unwalkable) -> str:
    """What a reader should know where models that should be run block by block were not."""
    return f"whole models were run, not block by block: {error.faults[0].what}"
