"""Weights from losses, one per model: how well each expert predicts the answers of the newest one's typical samples (LM-Cocktail)."""

from __future__ import annotations

import math

from recall_merge.merging.forward import expert_tokenizer, load_expert
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import LossWeights, RecallWeights
from recall_merge.merging.samples import encode_samples
from recall_merge.merging.weights import MergeWeights, TypicalSamples
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress


def weights_from_losses(plan: Plan, rule: LossWeights, samples: TypicalSamples, progress: Progress) -> MergeWeights:
    """Weights that are the same at every layer.

    Raises:
        CheckpointError: if a model cannot be run, or its loss is not finite.
    """
    import torch

    from recall_merge.maths.methods.informed import cocktail_weights
    from recall_merge.models.losses import mean_loss

    losses: dict[str, float] = {}
    for expert in plan.experts:
        rows = encode_samples(plan, samples.rows, expert_tokenizer(plan, expert))
        with progress.stage(f"loss of {expert.name}", sum(len(row.input_ids) for row in rows), "tokens") as advance:
            model = load_expert(plan, expert, RecallWeights.model_validate({}))
            losses[expert.name] = mean_loss(model, rows, progress=advance)
        if not math.isfinite(losses[expert.name]):
            raise CheckpointError(f"the loss of expert '{expert.name}' is not finite", where=expert.folder, fix="look at its training")
    row = torch.tensor(cocktail_weights([*losses.values()], temperature=rule.temperature), dtype=torch.float64)
    weights = row.repeat(plan.base.layers.last + 1, 1)
    return MergeWeights(tuple(losses), weights, samples=samples.rows, notes=samples.notes, losses=losses)
