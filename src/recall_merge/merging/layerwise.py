"""One pass over all models, depth by depth: read a block of each, run it, compare, weigh, merge, write, and let it go.

The weights of a depth need only the representations up to there. So with weights from representations every model is read once, and in
memory is one block of each, beside the samples' hidden states. The result is that of `weigh` and `fuse`, to the bit.
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
from recall_merge.merging.run import Representations
from recall_merge.merging.samples import TypicalSample, check_finite, expert_tokenizer, parameters, walk
from recall_merge.merging.tensors import fuse_into
from recall_merge.merging.weights import Weighting, pool_of, weigh_alike
from recall_merge.runtime.parallel import in_order

if TYPE_CHECKING:
    from recall_merge.models.layerwise import Walk

Typical = tuple[list[str], tuple[TypicalSample, ...], list[str]]


def merge_by_depth(writer: WeightWriter, plan: Plan, typical: Typical, digest: Digest, advance: Callable[[int], None]) -> Weighting:
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

    rule, depths = plan.weights, plan.base.depths
    assert isinstance(rule, Representations)
    texts, samples, notes = typical
    pool = pool_of(plan, rule)
    tokens = [tokenize(texts, expert_tokenizer(plan, expert), max_tokens=plan.samples.max_tokens) for expert in pool]
    alike = torch.empty(0, len(pool), dtype=torch.float64)

    def fuse_depth(depth: int, plan: Plan) -> Weighting:
        weighting = weigh_alike(plan, rule, alike, samples, notes)
        fuse_into(writer, plan, weighting, digest, advance, [name for name in plan.specs if depths.of(name) == depth])
        return weighting

    def merge_depth(depth: int) -> None:
        """A function of its own, so that nothing holds its blocks any more when the next ones are read."""
        nonlocal alike
        held = hold(plan, depth)
        experts = pool_of(held, rule)
        own = [partial(parameters, held, expert, rule, depth, ids) for expert, ids in zip(experts, tokens, strict=True)]
        states = step(walks, own)
        for expert, reached in zip(experts, states, strict=True):
            check_finite(plan, reached, expert)
        here = similarity(torch.stack(states), kernel=rule.kernel, bandwidth=rule.bandwidth)
        alike = torch.cat([alike, here.unsqueeze(0)])
        fuse_depth(depth, held)

    with ExitStack() as stack:
        walks: list[Walk] = [stack.enter_context(walk(plan, expert, rule, ids)) for expert, ids in zip(pool, tokens, strict=True)]
        for depth in range(depths.blocks + 1):
            merge_depth(depth)
    return fuse_depth(depths.last, plan)


def hold(plan: Plan, depth: int) -> Plan:
    """The plan, its checkpoints' tensors of one depth in memory; but not the tables of tokens, of which texts need a few rows only."""
    names = [name for name in plan.specs if plan.base.depths.of(name) == depth and name not in plan.base.token_tensors]

    def held(checkpoint: Checkpoint, wanted: list[str]) -> HeldCheckpoint:
        return HeldCheckpoint.of(checkpoint, dict(zip(wanted, in_order(checkpoint.read, wanted, plan.threads), strict=True)))

    merged = [name for name in names if plan.merges(name)]
    experts = [
        replace(expert, checkpoint=held(expert.checkpoint, merged)) if isinstance(expert, FullExpert) else expert for expert in plan.experts
    ]
    return replace(plan, base=held(plan.base, names), experts=tuple(experts))
