"""Weights from losses, one a model: how well each expert says the answers of the newest one's typical samples (LM-Cocktail)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recall_merge.merging.plan import Plan
from recall_merge.merging.run import Losses, RecallWeights
from recall_merge.merging.samples import build_expert, expert_tokenizer, labelled, typical_texts
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from recall_merge.merging.weights import MergeWeights

RULE = RecallWeights.model_validate({})  # typical samples are chosen as RECALL chooses them


def weights_from_losses(plan: Plan, rule: Losses, progress: Progress) -> MergeWeights:
    """Weights that are the same at every layer.

    Raises:
        DataError: if no row has any text.
        CheckpointError: if a model cannot be run, or its loss is not finite.
    """
    import torch

    from recall_merge.maths.methods.informed import cocktail_weights
    from recall_merge.merging.weights import MergeWeights
    from recall_merge.models.losses import mean_loss

    _, samples, notes = typical_texts(plan, RULE, progress)
    losses: dict[str, float] = {}
    for expert in plan.experts:
        rows = labelled(plan, samples, expert_tokenizer(plan, expert))
        with progress.stage(f"loss of {expert.name}", sum(len(row.input_ids) for row in rows), "tokens") as advance:
            losses[expert.name] = mean_loss(build_expert(plan, expert, RULE), rows, progress=advance)
        if not torch.tensor(losses[expert.name]).isfinite():
            raise CheckpointError(f"the loss of expert '{expert.name}' is not finite", where=expert.folder, fix="look at its training")
    row = torch.tensor(cocktail_weights([*losses.values()], temperature=rule.temperature), dtype=torch.float64)
    return MergeWeights(tuple(losses), row.repeat(plan.base.layers.last + 1, 1), samples=samples, notes=tuple(notes), losses=losses)
