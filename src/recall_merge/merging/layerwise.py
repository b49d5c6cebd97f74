"""One pass over all models, layer by layer: read a block of each, run it, compare, weigh, merge, write, and let it go.

The weights of a layer need only the representations up to there. So with weights from representations every model is read once, and in
memory is one block of each, beside the samples' hidden states. The result is that of `compute_weights` and `merge_tensors`, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from recall_merge.files.checkpoint import Checkpoint, HeldCheckpoint
from recall_merge.files.experts import Digest, FullExpert
from recall_merge.files.output import WeightWriter
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import RecallWeights
from recall_merge.merging.samples import TypicalSample, check_finite, expert_tokenizer, parameters, walk
from recall_merge.merging.tensors import merge_tensors_into
from recall_merge.merging.weights import MergeWeights, pool_of, weights_from_similarity
from recall_merge.runtime.parallel import in_order

if TYPE_CHECKING:
    from recall_merge.models.layerwise import LayerwiseForward

Typical = tuple[list[str], tuple[TypicalSample, ...], list[str]]


def merge_layerwise(writer: WeightWriter, plan: Plan, typical: Typical, digest: Digest, advance: Callable[[int], None]) -> MergeWeights:
    """Weigh, merge and write all tensors; returns by which weights.

    Args:
        typical: what `typical_texts` gives.
        digest: is told of every tensor of the base.
        advance: is told the bytes of tensors when they are written.

    Raises:
        CheckpointError: if a model cannot be run, or holds or gives numbers that are not finite; `Unwalkable` if it cannot be run so.
        ResultError: if the merge overflows.
    """
    import torch

    from recall_merge.maths.similarity import similarity
    from recall_merge.models.hidden_states import tokenize
    from recall_merge.models.layerwise import step

    rule, layers = plan.weights, plan.base.layers
    assert isinstance(rule, RecallWeights)
    texts, samples, notes = typical
    pool = pool_of(plan, rule)
    tokens = [tokenize(texts, expert_tokenizer(plan, expert), max_tokens=plan.samples.max_tokens) for expert in pool]
    similarity_rows = torch.empty(0, len(pool), dtype=torch.float64)

    def merge_layer_by(layer: int, plan: Plan) -> MergeWeights:
        merge_weights = weights_from_similarity(plan, rule, similarity_rows, samples, notes)
        merge_tensors_into(writer, plan, merge_weights, digest, advance, [name for name in plan.specs if layers.of(name) == layer])
        return merge_weights

    def merge_layer(layer: int) -> None:
        """A function of its own, so that nothing holds its blocks any more when the next ones are read."""
        nonlocal similarity_rows
        held = hold(plan, layer)
        experts = pool_of(held, rule)
        own = [partial(parameters, held, expert, rule, layer, ids) for expert, ids in zip(experts, tokens, strict=True)]
        states = step(walks, own)
        for expert, reached in zip(experts, states, strict=True):
            check_finite(plan, reached, expert)
        here = similarity(torch.stack(states), kernel=rule.kernel, bandwidth=rule.bandwidth)
        similarity_rows = torch.cat([similarity_rows, here.unsqueeze(0)])
        merge_layer_by(layer, held)

    with ExitStack() as stack:
        walks: list[LayerwiseForward] = [
            stack.enter_context(walk(plan, expert, rule, ids)) for expert, ids in zip(pool, tokens, strict=True)
        ]
        for layer in range(layers.blocks + 1):
            merge_layer(layer)
    return merge_layer_by(layers.last, plan)


def hold(plan: Plan, layer: int) -> Plan:
    """The plan, its checkpoints' tensors of one layer in memory; but not the tables of tokens, of which texts need a few rows only."""
    names = [name for name in plan.specs if plan.base.layers.of(name) == layer and name not in plan.base.token_tensors]

    def held(checkpoint: Checkpoint, wanted: list[str]) -> HeldCheckpoint:
        return HeldCheckpoint.of(checkpoint, dict(zip(wanted, in_order(checkpoint.read, wanted, plan.threads), strict=True)))

    merged = [name for name in names if plan.merges(name)]
    experts = [
        replace(expert, checkpoint=held(expert.checkpoint, merged)) if isinstance(expert, FullExpert) else expert for expert in plan.experts
    ]
    return replace(plan, base=held(plan.base, names), experts=tuple(experts))
